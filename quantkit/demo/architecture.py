"""The untrained components of the demo pipeline: FLUX's own classes in a small size.

Every Linear inside the transformer's blocks takes 256, 1024 or 1280 inputs, so quantization in groups of 128 fits
all of them.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from quantkit.demo.scenes import CANVAS_PX
from quantkit.demo.tokenizers import CAPTION_TOKENS

LATENT_CHANNELS = 16
LATENT_PX = CANVAS_PX // 4
TEXT_WIDTH = 128

_TEXT_LAYERS, _TEXT_HEADS = 3, 4


def build_autoencoder() -> AutoencoderKL:
    """Build the image autoencoder: 64 x 64 x 3 pixels to 16 x 16 x 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # More than one channel a group: a group norm of single channels would erase flat colours.
        norm_num_groups=8,
        sample_size=CANVAS_PX,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the CLIP text encoder, whose pooled output conditions every block."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=_TEXT_LAYERS,
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build the T5 text encoder, whose tokens the image attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // _TEXT_HEADS,
            d_ff=2 * TEXT_WIDTH,
            num_layers=_TEXT_LAYERS,
            num_heads=_TEXT_HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """Build the FLUX transformer: two double and four single blocks, 8 heads of 32.

    Modulation and output start at zero, so that every block starts as the identity.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    zeroed = [
        module.linear for block in blocks for name, module in block.named_children() if name.startswith("norm1")
    ]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    zeroed += [transformer.norm_out.linear, transformer.proj_out]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_pipeline(
    autoencoder: AutoencoderKL,
    clip: CLIPTextModel,
    clip_tokenizer: CLIPTokenizer,
    t5: T5EncoderModel,
    t5_tokenizer: T5Tokenizer,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    """Put the components together as an ordinary pipeline in bfloat16; the components themselves are converted."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False),
        vae=autoencoder,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.bfloat16)
