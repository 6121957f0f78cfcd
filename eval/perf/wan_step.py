"""One denoising step of a full Wan2.2 T2V-A14B transformer with random weights: BF16, W4A16, FP8 compute from W4.

One of the two experts, one pass (guidance runs two), 512 text tokens; every variant runs in this process in turn::

    PYTHONPATH=runtime python eval/perf/wan_step.py --output wan-step.json --plot wan-step.svg
    PYTHONPATH=runtime python eval/perf/wan_step.py --frames 17 --modes compiled

Needs torch and diffusers; BF16 needs 29 GB of device memory and about 10 more for 81 frames.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import denoising
import measuring

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
TEXT_TOKENS = 512
TINY = {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256, "text_dim": 128, "freq_dim": 64}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON and the plot."""
    parser = measuring.common_options(__doc__)
    denoising.add_options(parser)
    parser.add_argument("--size", type=read_size, help="height x width in pixels (default 480x832)")
    parser.add_argument("--frames", type=measuring.numbers, help="frames of a video (default 81)")
    parser.add_argument("--batches", type=measuring.numbers, default=[1], help="videos a step (default 1)")
    options = parser.parse_args(arguments)
    config = measuring.published(MODEL, "transformer/config.json") | (TINY if options.tiny else {})
    height, width = options.size or ((64, 64) if options.tiny else (480, 832))
    text_tokens = 16 if options.tiny else TEXT_TOKENS
    cases = []
    for batch in options.batches:
        for frames in options.frames or [5 if options.tiny else 81]:
            latents = latent_shape(config, frames, height, width)
            patches = [size // patch for size, patch in zip(latents[1:], config["patch_size"], strict=True)]
            inputs = functools.partial(step_inputs, config, latents, text_tokens, batch)
            tokens = patches[0] * patches[1] * patches[2]
            cases.append(denoising.Case(f"{height}x{width}x{frames}", batch, tokens, inputs))
    name = f"Wan2.2 T2V-A14B transformer{' (tiny)' if options.tiny else ''}, {text_tokens} text tokens"
    mend = functools.partial(compute_rope, config=config)
    denoising.run(
        denoising.Architecture(name, functools.partial(build, config), ("blocks.",), mend), cases, options
    )


def read_size(text: str) -> tuple[int, int]:
    """Read e.g. 480x832."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 480x832")
    return int(height), int(width)


def latent_shape(config: dict[str, Any], frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return channels, frames, height and width of the latents of a video, by the strides of the published VAE."""
    vae = measuring.published(MODEL, "vae/config.json")
    stride = 2 ** (len(vae["dim_mult"]) - 1)
    frame_stride = 2 ** sum(vae["temperal_downsample"])
    edge = stride * config["patch_size"][1]
    if height % edge or width % edge or (frames - 1) % frame_stride:
        raise SystemExit(
            f"{height}x{width}x{frames}: height and width must be multiples of {edge}, frames one more than a "
            f"multiple of {frame_stride}"
        )
    return config["in_channels"], (frames - 1) // frame_stride + 1, height // stride, width // stride


def build(config: dict[str, Any]) -> nn.Module:
    """Make the transformer."""
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel.from_config(config)
    return model


def compute_rope(model: Any, config: dict[str, Any]) -> None:
    """Compute the rotary tables, which no checkpoint holds."""
    model.rope = type(model.rope)(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])


def step_inputs(
    config: dict[str, Any], latents: tuple[int, ...], text_tokens: int, batch: int, generator: torch.Generator
) -> dict[str, Any]:
    """Return random arguments for a video, as the pipeline passes them."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, dtype=denoising.DTYPE, device=generator.device, generator=generator)

    return {
        "hidden_states": noise(*latents),
        "timestep": torch.full((batch,), 900, device=generator.device),
        "encoder_hidden_states": noise(text_tokens, config["text_dim"]),
    }


if __name__ == "__main__":
    main()
