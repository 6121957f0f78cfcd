"""A FluxPipeline with random weights made on the device: full size, no checkpoint, no text encoders, no VAE."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from quantkit_runtime import W4A16Linear
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import packed_tensors
from quantkit_runtime.parallel.share import Share
from quantkit_runtime.parallel.tensor import add_sums, shard

CONFIG = (
    Path(__file__).resolve().parents[2]
    / "quantkit/families/published/black-forest-labs/FLUX.1-dev/transformer/config.json"
)
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
TEXT_TOKENS = 512
SCHEME = Scheme()


def build_pipeline(
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    packed: bool,
    compute: str = "auto",
    backend: str = "auto",
    layers: int | None = None,
) -> Any:
    """Make the pipeline; ranks of other branches get the same weights, those of a group their parts.

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
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    torch.set_default_dtype(before)

    def scheme_of(name: str) -> Scheme | None:
        return SCHEME if packed and name.startswith(BLOCKS) else None

    shares: dict[str, Share] = {} if group is None else shard(model, group, scheme_of)
    rank = 0 if group is None else dist.get_rank(group)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and scheme_of(name) is not None:
            _replace(model, name, _packed(module, _generator(name, shares, rank, device), device))
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = _values(parameter, _generator(owner, shares, rank, device), device)
        if attribute == "bias" and rank and owner in shares and shares[owner].style == "row":
            value.zero_()
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    if group is not None:
        add_sums(model, shares, group)
    for module in model.modules():
        if isinstance(module, W4A16Linear):
            module.prepare(torch.bfloat16, compute=compute, backend=backend)
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, model.eval())
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


def _generator(name: str, shares: dict[str, Share], rank: int, device: torch.device) -> torch.Generator:
    """Return one that gives every rank the same for what all of them hold, and each its own for its share."""
    seed = zlib.crc32(name.encode()) + (rank << 32 if name in shares else 0)
    return torch.Generator(device).manual_seed(seed)


def _values(parameter: torch.Tensor, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    if parameter.ndim == 1:
        fill = torch.zeros if parameter.shape[0] % 128 == 0 and parameter.shape[0] > 128 else torch.ones
        return fill(parameter.shape, dtype=parameter.dtype, device=device)  # biases, norms over a head
    value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return value.normal_(0, 0.5 / math.sqrt(parameter.shape[1]), generator=generator)


def _packed(linear: nn.Linear, generator: torch.Generator, device: torch.device) -> W4A16Linear:
    layer = W4A16Linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, device=device,
        bias_dtype=torch.bfloat16,
    )  # fmt: skip
    for name, (shape, dtype) in packed_tensors(linear.in_features, linear.out_features, SCHEME).items():
        buffer = layer.get_buffer(name)
        if name == "qweight":
            buffer.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name == "qzeros":
            buffer.fill_(0x77777777)
        else:  # codes of all values alike deviate by 4.6 steps
            spread = 0.5 / math.sqrt(linear.in_features) / 4.6
            buffer.copy_(torch.full(shape, spread, dtype=dtype, device=device))
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
