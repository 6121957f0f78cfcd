"""Sizes of a BAGEL model from its JSON files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.models.bagel_config import BagelConfig

FILES = {
    "config.json": {"model_type": "bagel", "vae_config": {"z_channels": 16, "downsample": 8}},
    "llm_config.json": {
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "sliding_window": 131072,
        "vocab_size": 152064,
    },
    "vit_config.json": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "rope": True,
    },
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_the_published_files_give_the_published_sizes(folder):
    config = BagelConfig.read(folder)
    assert (config.text.head_dim, config.text.rope_theta, config.vision.num_hidden_layers) == (128, 1e6, 27)
    assert (config.latent_dim, config.latent_positions, config.image_positions) == (64, 64**2, 70**2)


def test_position_tables_are_as_long_as_those_of_the_weights(folder):
    tables = {"latent_pos_embed.pos_embed": torch.zeros(9, 4), "vit_pos_embed.pos_embed": torch.zeros(25, 4)}
    save_file(tables, folder / "ema.safetensors")
    config = BagelConfig.read(folder)
    assert (config.latent_positions, config.image_positions) == (9, 25)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("config.json", "model_type", "qwen2", "model_type: must be 'bagel'"),
        ("config.json", "vae_config", [16], "vae_config: must be a mapping"),
        ("config.json", "latent_patch_size", "2", "latent_patch_size: must be a positive number"),
        ("llm_config.json", "hidden_size", None, "hidden_size: must be a positive number"),
        ("llm_config.json", "num_hidden_layers", 1.5, "num_hidden_layers: must be an integer"),
        ("llm_config.json", "num_key_value_heads", 3, "num_key_value_heads: 3 does not divide"),
        ("llm_config.json", "rope_scaling", {"type": "yarn"}, "rope_scaling: .* is not supported"),
        ("vit_config.json", "hidden_act", "relu", "hidden_act: 'relu' is not supported"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_file_and_key(folder, name, key, value, message):
    (folder / name).write_text(json.dumps({**FILES[name], key: value}), encoding="utf-8")
    with pytest.raises(CheckpointFormatError, match=f"{name}: {message}"):
        BagelConfig.read(folder)


def test_a_missing_key_or_file_is_named(folder):
    without = {key: value for key, value in FILES["vit_config.json"].items() if key != "patch_size"}
    (folder / "vit_config.json").write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(CheckpointFormatError, match=r"vit_config.json: patch_size: is missing"):
        BagelConfig.read(folder)
    (folder / "llm_config.json").unlink()
    with pytest.raises(CheckpointFormatError, match=r"llm_config.json: cannot be read"):
        BagelConfig.read(folder)
