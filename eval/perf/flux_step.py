"""One denoising step of the full FLUX.1-dev transformer with random weights: BF16, W4A16, FP8 compute from W4.

Every variant runs in this process in turn, eager and with its blocks compiled; beside each time stand the ratio to
BF16 of the same mode and size, and the peak memory::

    PYTHONPATH=runtime python eval/perf/flux_step.py --output flux-step.json --plot flux-step.svg
    PYTHONPATH=runtime python eval/perf/flux_step.py --sizes 512,1024 --batches 1 --modes compiled

Needs torch and diffusers; BF16 needs 25 GB of device memory and up to 10 more for the largest images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import denoising
import measuring

MODEL = "black-forest-labs/FLUX.1-dev"
PIXELS_PER_TOKEN = 16  # the VAE halves three times, the pipeline packs 2 x 2 latents into a token
TEXT_TOKENS = 512
TINY = {
    "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON and the plot."""
    parser = measuring.common_options(__doc__)
    denoising.add_options(parser)
    parser.add_argument("--sizes", type=measuring.numbers, help="edges in pixels (default 512,1024,1536,2048)")
    parser.add_argument("--batches", type=measuring.numbers, help="images a step (default 1,2)")
    options = parser.parse_args(arguments)
    config = measuring.published(MODEL, "transformer/config.json") | (TINY if options.tiny else {})
    sizes = options.sizes or ([64] if options.tiny else [512, 1024, 1536, 2048])
    batches = options.batches or ([1] if options.tiny else [1, 2])
    text_tokens = 16 if options.tiny else TEXT_TOKENS
    cases = [
        denoising.Case(
            f"{size}²",
            batch,
            (size // PIXELS_PER_TOKEN) ** 2,
            functools.partial(step_inputs, config, size // PIXELS_PER_TOKEN, text_tokens, batch),
        )
        for batch in batches
        for size in sizes
    ]
    name = f"FLUX.1-dev transformer{' (tiny)' if options.tiny else ''}, {text_tokens} text tokens"
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    denoising.run(denoising.Architecture(name, functools.partial(build, config), blocks), cases, options)


def build(config: dict[str, Any]) -> nn.Module:
    """Make the transformer."""
    from diffusers import FluxTransformer2DModel

    model: nn.Module = FluxTransformer2DModel.from_config(config)
    return model


def step_inputs(
    config: dict[str, Any], edge: int, text_tokens: int, batch: int, generator: torch.Generator
) -> dict[str, Any]:
    """Return random arguments for images of edge x edge tokens, as the pipeline passes them."""
    device = generator.device

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, dtype=denoising.DTYPE, device=device, generator=generator)

    positions = torch.zeros(edge, edge, 3, device=device, dtype=denoising.DTYPE)
    positions[..., 1] = torch.arange(edge, device=device)[:, None]
    positions[..., 2] = torch.arange(edge, device=device)
    return {
        "hidden_states": noise(edge * edge, config["in_channels"]),
        "encoder_hidden_states": noise(text_tokens, config["joint_attention_dim"]),
        "pooled_projections": noise(config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5, dtype=denoising.DTYPE, device=device),
        "guidance": torch.full((batch,), 3.5, device=device),
        "img_ids": positions.view(-1, 3),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=denoising.DTYPE),
    }


if __name__ == "__main__":
    main()
