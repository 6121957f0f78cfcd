"""Ovis-Image: double and single blocks like FLUX's with gated feed-forward layers; Qwen3 reads the prompt."""

from __future__ import annotations

from functools import partial

from quantkit.families.base import DiffusionFamily
from quantkit.families.flux import block_inputs
from quantkit.families.serving import VllmOmni
from quantkit.families.sizes import picture_grid
from quantkit.recipe.schema import Sampling

OVIS_IMAGE = DiffusionFamily(
    name="ovis-image",
    task="t2i",
    blocks={"transformer": ("transformer_blocks", "single_transformer_blocks")},
    sampling=Sampling(
        height=1024,
        width=1024,
        num_inference_steps=50,
        guidance_scale=5.0,
        negative_prompt="",
        max_sequence_length=256,
    ),
    vllm_omni=VllmOmni(unsupported="its Ovis-Image builds 16-bit layers only, packed ones find no place"),
    block_inputs=partial(block_inputs, guidance="guidance_scale"),
    grid=picture_grid,
)
