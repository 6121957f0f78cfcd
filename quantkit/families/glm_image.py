"""GLM-Image: an autoregressive model draws coarse image tokens, a diffusion transformer makes the image of them.

The transformer is quantized, as published. The autoregressive stage ``vision_language_encoder`` is an option: it is
half of the model, but a changed token changes the whole picture.
"""

from __future__ import annotations

from typing import Any

from quantkit.checkpoint import ModelFolder
from quantkit.families.base import BlockInputs, DiffusionFamily
from quantkit.families.serving import VllmOmni
from quantkit.families.sizes import Grid, picture_grid
from quantkit.recipe.schema import Sampling


def _grid(source: ModelFolder) -> Grid:
    """Of the latents, patches are made; a coarse token stands for two patches along each side."""
    return picture_grid(source, latents=2 * source.components["transformer"].config.get("patch_size", 2))


def _block_inputs(source: ModelFolder, component: str, sampling: Sampling) -> BlockInputs:
    """Count image tokens alone: the text is what a prompt has in quotes, a few bytes."""
    config = source.components[component].config
    patch = _grid(source).side // 2
    given: dict[str, Any] = sampling.given()
    tokens = (given["height"] // patch) * (given["width"] // patch)
    time_embedding = 2 * config["time_embed_dim"]
    rotary_embedding = 2 * 4 * tokens * config["attention_head_dim"]  # cosine and sine in float32
    branches = 2 if given["guidance_scale"] > 1 else 1
    return BlockInputs(
        calls=given["num_inference_steps"] * branches,
        passed_nbytes=2 * tokens * config["num_attention_heads"] * config["attention_head_dim"],
        shared_nbytes=time_embedding + rotary_embedding,
    )


GLM_IMAGE = DiffusionFamily(
    name="glm-image",
    task="t2i",
    blocks={
        "transformer": ("transformer_blocks",),
        "vision_language_encoder": ("model.language_model.layers",),
    },
    sampling=Sampling(
        height=1024,
        width=1024,
        num_inference_steps=50,
        guidance_scale=1.5,
        max_sequence_length=2048,
    ),
    optional=("vision_language_encoder",),
    kept={
        "glyph_projector.net.0": "its input features (1472 as published) divide by no group size above 64",
        "glyph_projector": "projects the text to be drawn once for all blocks",
        "prior_projector": "projects the coarse image tokens once for all blocks",
        "time_condition_embed": "embeds time and size once for all blocks",
        "model.visual": "the vision tower",
        "lm_head": "the head",
    },
    vllm_omni=VllmOmni(renames=((r"\.to_[qkv]$", ".to_qkv"),), row_parallel=(r"\.to_out\.0$", r"\.net\.2$")),
    block_inputs=_block_inputs,
    grid=_grid,
    block_outputs={"GlmImageTransformerBlock": ("hidden_states", "encoder_hidden_states")},
)
