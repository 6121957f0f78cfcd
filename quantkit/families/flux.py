"""FLUX.1: double and single blocks over packed latents; guidance distilled or classifier-free."""

from __future__ import annotations

from typing import Any

from quantkit.checkpoint import ModelFolder
from quantkit.families.base import BlockInputs, DiffusionFamily
from quantkit.families.serving import VllmOmni
from quantkit.families.sizes import picture_grid
from quantkit.recipe.schema import Sampling


def block_inputs(
    source: ModelFolder, component: str, sampling: Sampling, *, guidance: str = "true_cfg_scale"
) -> BlockInputs:
    """Count 2x2 patches of the latent as image tokens; both kinds of blocks get image and text.

    Args:
        source: See `DiffusionFamily.block_inputs`.
        component: See there.
        sampling: See there.
        guidance: The key that, above 1, makes each step run the model twice.
    """
    config = source.components[component].config
    patch = picture_grid(source).side
    given: dict[str, Any] = sampling.given()
    tokens = (given["height"] // patch) * (given["width"] // patch) + given["max_sequence_length"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    time_embedding = 2 * width
    rotary_embedding = 2 * 4 * tokens * config["attention_head_dim"]  # cosine and sine in float32
    branches = 2 if given[guidance] > 1 else 1
    return BlockInputs(
        calls=given["num_inference_steps"] * branches,
        passed_nbytes=2 * tokens * width,
        shared_nbytes=time_embedding + rotary_embedding,
    )


FLUX = DiffusionFamily(
    name="flux",
    task="t2i",
    guidance="true_cfg_scale",
    blocks={"transformer": ("transformer_blocks", "single_transformer_blocks")},
    sampling=Sampling(
        height=1024,
        width=1024,
        num_inference_steps=28,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        negative_prompt="",
        max_sequence_length=512,
    ),
    vllm_omni=VllmOmni(
        renames=((r"\.to_[qkv]$", ".to_qkv"), (r"\.add_[qkv]_proj$", ".add_kv_proj")),
        row_parallel=(r"\.to_out\.0$", r"\.to_add_out$", r"\.net\.2$"),
    ),
    block_inputs=block_inputs,
    grid=picture_grid,
)
