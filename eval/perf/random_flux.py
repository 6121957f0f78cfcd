"""A FluxPipeline with random weights made on the device: full size, no checkpoint, no text encoders, no VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import random_weights
from quantkit_runtime.config import Scheme
from quantkit_runtime.packed import PackedLayer
from quantkit_runtime.parallel.tensor import add_sums, shard

CONFIG = (
    Path(__file__).resolve().parents[2]
    / "quantkit/families/published/black-forest-labs/FLUX.1-dev/transformer/config.json"
)
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
TEXT_TOKENS = 512
SCHEME = Scheme()
DTYPE = torch.bfloat16


def build_pipeline(
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    packed: bool,
    compute: str = "auto",
    backend: str = "auto",
    layers: int | None = None,
) -> Any:
    """Make the pipeline, of which ranks of a group hold their parts.

    Args:
        device: Of this rank.
        group: Ranks that share the weights, None if this one has all.
        packed: Whether the Linears of the blocks are W4A16, group 128.
        compute: Of packed layers.
        backend: Of packed layers.
        layers: Double and single blocks, each; None is as many as are published.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    if layers is not None:
        config |= {"num_layers": layers, "num_single_layers": layers}
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)

    def is_packed(name: str) -> bool:
        return packed and name.startswith(BLOCKS)

    shares = {} if group is None else shard(model, group, lambda name: SCHEME if is_packed(name) else None)
    # The same numbers on all ranks: those of a group hold equal parts, which no kernel notices.
    generator = torch.Generator(device).manual_seed(0)

    def replace(name: str, module: nn.Module) -> PackedLayer | None:
        if not isinstance(module, nn.Linear) or not is_packed(name):
            return None
        return random_weights.packed_linear(
            module, device=device, dtype=DTYPE, generator=generator, compute=compute, backend=backend
        )

    random_weights.fill(model, device=device, dtype=DTYPE, generator=generator, replace=replace)
    if group is not None:
        add_sums(model, shares, group)
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(pipeline: Any, device: torch.device) -> dict[str, Any]:
    """Return random embeddings of a prompt and of a negative prompt, as arguments of the pipeline's call."""
    generator = torch.Generator(device).manual_seed(0)
    config = pipeline.transformer.config
    found = {}
    for prefix in ("", "negative_"):
        text = torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, generator=generator, device=device)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator, device=device)
        found[f"{prefix}prompt_embeds"] = text.bfloat16()
        found[f"{prefix}pooled_prompt_embeds"] = pooled.bfloat16()
    return found
