"""Tiny random Qwen omni models of the real classes, saved as ordinary checkpoints with tokenizer and processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch

HIDDEN = 128
MEL = 16
TOKENS_2_5 = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
TOKENS_3 = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == 'image' %}VISION_BOSIMAGEVISION_EOS
{%- elif part.type == 'audio' %}AUDIO_BOSAUDIOAUDIO_EOS
{%- else %}{{ part.text }}{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _tokenizer(special: dict[str, str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=special,
        model_max_length=4096,
    )


def _template(special: dict[str, str]) -> str:
    words = {
        "VISION_BOS": "vision_bos_token", "IMAGE": "image_token", "VISION_EOS": "vision_eos_token",
        "AUDIO_BOS": "audio_bos_token", "AUDIO_EOS": "audio_eos_token", "AUDIO": "audio_token",
    }  # fmt: skip
    template = CHAT_TEMPLATE
    template = template.replace("VISION_BOSIMAGEVISION_EOS", "{1}").replace("AUDIO_BOSAUDIOAUDIO_EOS", "{2}")
    image = "".join(special[words[word]] for word in ("VISION_BOS", "IMAGE", "VISION_EOS"))
    audio = "".join(special[words[word]] for word in ("AUDIO_BOS", "AUDIO", "AUDIO_EOS"))
    return template.replace("{1}", image).replace("{2}", audio)


def _save_processor(folder: Path, processor_class, special: dict[str, str], patch_size: int):
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, WhisperFeatureExtractor

    tokenizer = _tokenizer(special)
    size = {"shortest_edge": 4 * patch_size**2, "longest_edge": 64 * patch_size**2}
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size, size=size),
        video_processor=Qwen2VLVideoProcessor(patch_size=patch_size, size=size),
        feature_extractor=WhisperFeatureExtractor(feature_size=MEL, chunk_length=2),
        tokenizer=tokenizer,
        chat_template=_template(special),
    )
    processor.save_pretrained(folder)
    return processor.tokenizer


def build_qwen2_5_omni(folder: Path, *, seed: int = 0, kv_heads: int = 1) -> Path:
    """Save a random Qwen2.5-Omni: 2 thinker layers 128 wide, the rest as small as its classes allow."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniProcessor

    torch.manual_seed(seed)
    tokenizer = _save_processor(folder, Qwen2_5OmniProcessor, TOKENS_2_5, patch_size=14)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS_2_5.items()}
    multimodal = {
        "audio_token_index": ids["audio_token"],
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    config = Qwen2_5OmniConfig(
        thinker_config={
            **multimodal,
            "text_config": {
                **text, "num_key_value_heads": kv_heads, "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 14,
                "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1],
            },
            "audio_config": {
                "num_mel_bins": MEL, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96,
                "d_model": 64, "output_dim": HIDDEN, "max_source_positions": 100,
            },
            "user_token_id": tokenizer.convert_tokens_to_ids("u"),
        },
        talker_config={
            **multimodal, **text, "pad_token_id": 92, "vocab_size": 96, "embedding_size": HIDDEN, "head_dim": 64,
            "tts_text_start_token_id": 1, "tts_text_end_token_id": 2, "tts_text_pad_token_id": 3,
            "tts_codec_start_token_id": 93, "tts_codec_end_token_id": 94, "tts_codec_pad_token_id": 92,
            "tts_codec_mask_token_id": 95,
        },
        token2wav_config={
            "dit_config": {
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "emb_dim": 32, "head_dim": 32,
                "num_embeds": 97, "mel_dim": 8, "enc_emb_dim": 16, "enc_dim": 16,
                "enc_channels": [16, 16, 16, 16, 48], "enc_attention_channels": 8, "enc_se_channels": 8,
                "enc_res2net_scale": 2, "look_ahead_layers": [1], "look_backward_layers": [0],
            },
            "bigvgan_config": {
                "mel_dim": 8, "upsample_initial_channel": 32, "resblock_kernel_sizes": [3],
                "resblock_dilation_sizes": [[1, 3, 5]], "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
            },
        },
    )  # fmt: skip
    model = Qwen2_5OmniForConditionalGeneration(config)
    _shake(model)
    _never_write(model, ids.values())
    model.thinker.to(torch.bfloat16)
    model.talker.to(torch.bfloat16)
    frequencies = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"  # stored by the release that published it
    state = {**model.state_dict(), frequencies: model.get_buffer(frequencies).clone()}
    model.save_pretrained(folder, max_shard_size="1MB", state_dict=state)
    _edit(folder, architectures=["Qwen2_5OmniModel"])  # as published: no class of transformers
    speaker = {"cond": torch.randn(1, 16), "ref_mel": torch.randn(1, 12, 8), "bos_token": 93}
    torch.save({"Chelsie": speaker}, folder / "spk_dict.pt")
    return folder


def build_qwen3_omni(folder: Path, *, seed: int = 0, kv_heads: int = 1) -> Path:
    """Save a random Qwen3-Omni: 2 thinker layers 128 wide of 4 experts each, of which a token takes 2."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor

    torch.manual_seed(seed)
    tokenizer = _save_processor(folder, Qwen3OmniMoeProcessor, TOKENS_3, patch_size=16)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS_3.items()}
    multimodal = {
        "audio_token_id": ids["audio_token"],
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
    }
    text = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }
    config = Qwen3OmniMoeConfig(
        thinker_config={
            **multimodal,
            "text_config": {**text, "num_key_value_heads": kv_heads, "vocab_size": len(tokenizer)},
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 16,
                "out_hidden_size": HIDDEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            },
            "audio_config": {
                "num_mel_bins": MEL, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96,
                "d_model": 64, "output_dim": HIDDEN, "max_source_positions": 100, "downsample_hidden_size": 8,
            },
            "user_token_id": tokenizer.convert_tokens_to_ids("u"),
        },
        talker_config={
            **multimodal,
            "thinker_hidden_size": HIDDEN,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
            "num_code_groups": 2,
            "text_config": {
                **text, "vocab_size": 96, "intermediate_size": 96, "hidden_size": 64, "num_attention_heads": 1,
                "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            },
            "code_predictor_config": {
                "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "num_code_groups": 2,
            },
            "speaker_id": {"ethan": 1},
        },
        code2wav_config={
            "codebook_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 48, "num_hidden_layers": 1, "num_quantizers": 2, "upsample_rates": [2, 2],
            "upsampling_ratios": [2], "decoder_dim": 32,
        },
    )  # fmt: skip
    model = Qwen3OmniMoeForConditionalGeneration(config)
    _shake(model)
    _never_write(model, ids.values())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    return folder


def _never_write(model, tokens):
    """Give tokens that stand for pictures and sounds a logit of 0, so that no answer holds one."""
    with torch.no_grad():
        model.thinker.lm_head.weight[list(tokens)] = 0


def _shake(model: torch.nn.Module) -> None:
    """Give norms and biases values of their own, so that no two tensors can be taken for each other."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # transformers leaves the talker's as they came from the allocator
                parameter.normal_(std=0.02)
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def packed_qwen2_5_omni(home):
    """Make a tiny model with two heads of keys, round it to 4 bit in groups of 32, and return its folder."""
    from quantkit.quantize.run import prepare, quantize
    from quantkit.recipe import load_recipe

    recipe = home / "recipe.yaml"
    scheme = {"group_size": 32, "iters": 0, "nsamples": 2, "batch_size": 1}
    recipe.write_text(json.dumps({"version": 1, "model": {"id": "omni", "task": "chat"}, "scheme": scheme}))
    source = build_qwen2_5_omni(home / "bf16", kv_heads=2)
    return quantize(prepare(load_recipe(recipe), source), home / "w4").output
