"""Wan2.2: the A14B pipelines with two experts, and TI2V-5B with a timestep per token."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny.tokenizers import t5_tokenizer

_LATENT_CHANNELS = 4
_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def build_wan_t2v(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Save a random WanPipeline in the style of T2V-A14B, two experts 128 wide; return its folder."""
    return _save(folder, "WanPipeline", dtype, seed, boundary_ratio=0.875, experts=2)


def build_wan_i2v(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Save a random WanImageToVideoPipeline in the style of I2V-A14B; return its folder.

    The transformers see the noisy latents, the encoded image and a mask of 4 channels side by side.
    """
    in_channels = 2 * _LATENT_CHANNELS + 4
    return _save(
        folder,
        "WanImageToVideoPipeline",
        dtype,
        seed,
        in_channels=in_channels,
        boundary_ratio=0.9,
        experts=2,
        image_encoder=None,
        image_processor=None,
    )


def build_wan_ti2v(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Save a random WanPipeline in the style of TI2V-5B: one transformer and a patchifying VAE."""
    return _save(folder, "WanPipeline", dtype, seed, expand_timesteps=True, experts=1, vae_patch=2)


def _save(
    folder: Path,
    pipeline_class: str,
    dtype: torch.dtype,
    seed: int,
    *,
    experts: int,
    in_channels: int = _LATENT_CHANNELS,
    vae_patch: int = 1,
    **config,
) -> Path:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformers = [_transformer(in_channels, dtype) for _ in range(experts)]
    pipeline = getattr(diffusers, pipeline_class)(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
        ).to(dtype),
        vae=_vae(vae_patch).to(dtype),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        **config,
    )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(in_channels: int, dtype: torch.dtype):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=in_channels,
        out_channels=_LATENT_CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=64,
    )
    for name, parameter in model.named_parameters():
        if not set(name.split(".")).intersection(_FLOAT32):
            parameter.data = parameter.data.to(dtype)
    return model


def _vae(patch: int):
    from diffusers import AutoencoderKLWan

    colours = 3 * patch**2
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * _LATENT_CHANNELS,
        latents_std=[1.0] * _LATENT_CHANNELS,
        is_residual=patch > 1,
        in_channels=colours,
        out_channels=colours,
        patch_size=patch if patch > 1 else None,
        scale_factor_temporal=4,
        scale_factor_spatial=8 * patch,
    )
