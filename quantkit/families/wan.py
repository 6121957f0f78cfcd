"""Wan2.2: text or a picture to video.

A14B has two transformers of the same shape: ``transformer`` for the noisy steps, ``transformer_2`` for those below
``boundary_ratio``, each with a guidance scale of its own. TI2V-5B has one, and a timestep for every token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantkit.checkpoint import ModelFolder, read_json
from quantkit.errors import CheckpointError
from quantkit.families.base import BlockInputs, DiffusionFamily
from quantkit.families.serving import VllmOmni
from quantkit.families.sizes import wan_grid
from quantkit.recipe.schema import Sampling

_KEPT = {
    "condition_embedder.time_embedder": "the model computes it in float32",
    "condition_embedder": "embeds time and text once for all blocks",
    "proj_out": "the final projection",
}
_VLLM_OMNI = VllmOmni(
    renames=(
        (r"\.attn1\.to_[qkv]$", ".attn1.to_qkv"),  # cross attention stays in three
        (r"\.to_out\.0$", ".to_out"),
        (r"\.ffn\.net\.0\.proj$", ".ffn.net_0.proj"),
        (r"\.ffn\.net\.2$", ".ffn.net_2"),
    ),
    row_parallel=(r"\.to_out\.0$", r"\.ffn\.net\.2$"),
)


def _block_inputs(source: ModelFolder, component: str, sampling: Sampling) -> BlockInputs:
    """Count patches of the latent video as tokens; the text of fixed length is the same for all blocks."""
    config = source.components[component].config
    vae = source.components["vae"].config
    given: dict[str, Any] = sampling.given()
    _, *patch = config["patch_size"]
    frames = (given["num_frames"] - 1) // vae.get("scale_factor_temporal", 4) + 1
    rows, columns = (
        given[key] // (vae.get("scale_factor_spatial", 8) * size)
        for key, size in zip(("height", "width"), patch, strict=True)
    )
    tokens = frames * rows * columns
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = 2 * given["max_sequence_length"] * width
    times = tokens if source.config.get("expand_timesteps") else 1
    time_embedding = 2 * times * 6 * width  # shift, scale and gate of attention and of the feed-forward layer
    rotary_embedding = 2 * 4 * tokens * config["attention_head_dim"]  # cosine and sine in float32
    branches = 2 if given["guidance_scale"] > 1 else 1
    return BlockInputs(
        calls=_count_steps(source, component, given["num_inference_steps"]) * branches,
        passed_nbytes=2 * tokens * width,
        shared_nbytes=text + time_embedding + rotary_embedding,
    )


def _count_steps(source: ModelFolder, component: str, steps: int) -> int:
    """Return how many of the denoising steps a transformer does; all of them where no scheduler is at hand."""
    boundary = source.config.get("boundary_ratio")
    part = source.components.get("scheduler")
    if boundary is None or part is None:
        return steps
    import diffusers

    scheduler_class = getattr(diffusers, part.class_name, None)
    if scheduler_class is None:
        raise CheckpointError(f"{part.folder}: {part.class_name} is no class of the installed diffusers")
    scheduler = scheduler_class.from_config(read_json(part.folder / "scheduler_config.json"))
    scheduler.set_timesteps(steps)
    noisy = int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())
    return noisy if component == "transformer" else len(scheduler.timesteps) - noisy


T2V = DiffusionFamily(
    name="wan2.2-t2v",
    task="t2v",
    blocks={"transformer": ("blocks",), "transformer_2": ("blocks",)},
    sampling=Sampling(
        height=720,
        width=1280,
        num_frames=81,
        num_inference_steps=40,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        negative_prompt="",
        max_sequence_length=512,
    ),
    kept=_KEPT,
    vllm_omni=_VLLM_OMNI,
    block_inputs=_block_inputs,
    grid=wan_grid,
)

I2V = replace(
    T2V,
    name="wan2.2-i2v",
    task="i2v",
    sampling=Sampling(height=480, width=832, guidance_scale=3.5, guidance_scale_2=3.5).over(T2V.sampling),
)

TI2V = replace(
    T2V,
    name="wan2.2-ti2v",
    frames_per_second=24,
    blocks={"transformer": ("blocks",)},
    sampling=Sampling(
        height=704,
        width=1280,
        num_frames=121,
        num_inference_steps=50,
        guidance_scale=5.0,
        negative_prompt="",
        max_sequence_length=512,
    ),
)
