"""Ovis-Image: FLUX-like blocks with gated feed-forward layers, Qwen3 as text encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny.tokenizers import chat_tokenizer

_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def build_ovis_image(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Save a random OvisImagePipeline of 2 double and 2 single blocks, 128 wide; return its folder."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        OvisImagePipeline,
        OvisImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(["<|im_start|>", "<|im_end|>"], chat_template=_TEMPLATE)
    pipeline = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
            )
        ),
        transformer=OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.0,
            scaling_factor=1.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )
    pipeline.to(dtype).save_pretrained(folder)
    return folder
