"""FLUX.1: double and single blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny.tokenizers import clip_tokenizer, t5_tokenizer


def build_flux(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, heads: int = 4) -> Path:
    """Save a random FluxPipeline of 2 double and 2 single blocks, ``heads`` * 32 wide; return its folder."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    letters = clip_tokenizer(folder / "tokenizer")
    words = t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=letters,
        tokenizer_2=words,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(letters),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                projection_dim=32,
                bos_token_id=letters.bos_token_id,
                eos_token_id=letters.eos_token_id,
            )
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(words), d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
        ),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=32,
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
