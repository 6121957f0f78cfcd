"""FLUX.1: double and single blocks over packed latents; guidance distilled or classifier-free."""

from __future__ import annotations

from quantkit.families.base import DiffusionFamily
from quantkit.families.serving import VllmOmni
from quantkit.recipe.schema import Sampling

FLUX = DiffusionFamily(
    name="flux",
    task="t2i",
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
)
