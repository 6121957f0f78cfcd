"""GLM-Image: an autoregressive model draws coarse image tokens, a diffusion transformer the image."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny.tokenizers import chat_tokenizer

_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)
_IMAGE_TOKENS = 64


def build_glm_image(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Save a random GlmImagePipeline, both of its stages 128 wide; return its folder.

    ``glyph_projector`` reads text embeddings of an odd width, as the published one does (1472).
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, GlmImageProcessor, T5Config, T5EncoderModel
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(
        ["<|image|>", "<sop>", "<eop>", "<|image_start|>"],
        chat_template=_TEMPLATE,
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
            "bos_token": "<|image_start|>",
        },
    )
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(extra_ids=0),
        processor=GlmImageProcessor(
            GlmImageImageProcessorPil(patch_size=16, temporal_patch_size=1, merge_size=1),
            tokenizer,
            chat_template=_TEMPLATE,
        ),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=384, d_model=72, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
        ),
        vision_language_encoder=_autoregressive_stage(tokenizer),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            text_embed_dim=72,
            time_embed_dim=64,
            condition_dim=32,
            prior_vq_quantizer_codebook_size=_IMAGE_TOKENS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    pipeline.to(dtype).save_pretrained(folder)
    # diffusers mistakes transformers' glm_image for its own module; the published index says transformers.
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"glm_image"', '"transformers"'))
    return folder


def _autoregressive_stage(tokenizer):
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config={
                "vocab_size": max(len(tokenizer), _IMAGE_TOKENS),
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "pad_token_id": tokenizer.pad_token_id,
                "vision_vocab_size": _IMAGE_TOKENS,
                "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 64,
                "num_heads": 2,
                "image_size": 64,
                "intermediate_size": 64,
            },
            vq_config={"embed_dim": 32, "num_embeddings": _IMAGE_TOKENS, "latent_channels": 64},
            image_token_id=tokenizer.image_token_id,
            image_start_token_id=0,
            image_end_token_id=1,
        )
    )
    # A random model would end its picture early; the pipeline needs every token of it.
    model.generation_config.eos_token_id = None
    return model
