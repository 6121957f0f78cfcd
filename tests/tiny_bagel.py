"""A tiny random BAGEL in the layout of the published one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = [
    "what",
    "is",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "the",
    "left",
    "right",
    "white",
    "black",
    "draw",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
LLM_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
VIT_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "image_size": 56,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-06,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
}
ROOT_CONFIG = {
    "architectures": ["BagelForConditionalGeneration"],
    "model_type": "bagel",
    "latent_patch_size": 2,
    "vae_config": {"downsample": 8, "z_channels": 16},
}


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=512,
    )


def write_configs(folder: Path) -> None:
    """Write the JSON files that decide the architecture."""
    for name, config in (("config", ROOT_CONFIG), ("llm_config", LLM_CONFIG), ("vit_config", VIT_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def random_model(*, seed: int = 0):
    """Return a random model in float32; norms and position tables are random too, so that none can be left out."""
    from quantkit_runtime.models.bagel import Bagel
    from quantkit_runtime.models.bagel_config import BagelConfig, TextConfig, VisionConfig

    def pick(kind, config):
        return kind(**{key: value for key, value in config.items() if key in kind.__dataclass_fields__})

    torch.manual_seed(seed)
    model = Bagel(
        BagelConfig(
            text=pick(TextConfig, LLM_CONFIG),
            vision=pick(VisionConfig, VIT_CONFIG),
            latent_patch_size=2,
            latent_dim=64,
            latent_positions=16,
            image_positions=16,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("pos_embed"):
                parameter.normal_()
    return model.eval()


def random_vae(*, seed: int = 0):
    """Return a random autoencoder of FLUX's kind in float32, 32 channels wide."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = 4
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[32] * levels,
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def as_published(state):
    """Rename the tensors of diffusers' autoencoder to those of ``ae.safetensors``."""
    names = (
        (r"^encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
        (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"^decoder\.up_blocks\.(\d)\.resnets", lambda found: f"decoder.up.{3 - int(found[1])}.block"),
        (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda found: f"decoder.up.{3 - int(found[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    )
    renamed = {}
    for theirs, tensor in state.items():
        name = theirs
        is_attention = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[:, :, None, None].contiguous() if is_attention else tensor
    return renamed


def qwen3(model, *, expert: str = ""):
    """Return transformers' Qwen3 with the weights of one expert; it has a bias in o_proj too, here zero."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text = model.config.text
    other = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            attention_bias=True,
            tie_word_embeddings=False,
        )
    ).eval()
    ours = model.language_model.state_dict()
    state = {}
    for name, tensor in other.state_dict().items():
        if name.endswith("o_proj.bias"):
            state[name] = torch.zeros_like(tensor)
            continue
        parts = name.split(".")
        position = next(
            (at for at, part in enumerate(parts) if part == "mlp" or "norm" in part or part.endswith("_proj")), None
        )
        if expert and position is not None:
            parts[position] += expert
        state[name] = ours[".".join(parts)]
    other.load_state_dict(state)
    return other


def qwen2_config(config):
    """Return the configuration of a Qwen2, which has no q_norm and k_norm, with the sizes of a Qwen3."""
    from transformers import Qwen2Config

    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    return Qwen2Config(**{key: getattr(config, key) for key in keys})


def build_bagel(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, indexed: bool = True) -> Path:
    """Save a random BAGEL of two layers, 128 wide; return its folder."""
    folder.mkdir(parents=True)
    write_configs(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    model = random_model(seed=seed).to(dtype)
    vae = as_published({name: tensor.to(dtype) for name, tensor in random_vae(seed=seed).state_dict().items()})
    save_file(model.state_dict(), folder / "ema.safetensors", metadata={"format": "pt"})
    save_file(vae, folder / "ae.safetensors", metadata={"format": "pt"})
    if indexed:
        weight_map = dict.fromkeys(model.state_dict(), "ema.safetensors") | dict.fromkeys(vae, "ae.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _tokenizer().save_pretrained(folder)
    return folder
