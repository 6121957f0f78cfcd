"""The sizes of a BAGEL model, read from the JSON files beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from quantkit_runtime.checkpoint import read_json, read_tensors
from quantkit_runtime.errors import CheckpointFormatError

_Config = TypeVar("_Config", "TextConfig", "VisionConfig")
# What the published model has. Its configuration files leave these out, or are wrong about them.
_LATENT_POSITIONS = 64**2
_IMAGE_POSITIONS = 70**2
_LATENT_CHANNELS = 16
_LATENT_PATCH_SIZE = 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder, from ``llm_config.json``; both experts have the same."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 32_768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP tower, from ``vit_config.json``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """As SigLIP has them; BAGEL takes its features before the last layer, which is not in the checkpoint."""
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class BagelConfig:
    """Sizes of a whole model.

    Attributes:
        text: Of the decoder.
        vision: Of the tower that reads images.
        latent_patch_size: Latents along a side that are one token.
        latent_dim: Numbers per latent token: VAE channels times the area of a latent patch.
        latent_positions: Rows of the position table of latents to be generated.
        image_positions: Rows of the position table of images to be understood.
    """

    text: TextConfig
    vision: VisionConfig
    latent_patch_size: int
    latent_dim: int
    latent_positions: int
    image_positions: int

    @property
    def patches_per_side(self) -> int:
        """Of the largest picture that is understood."""
        return self.vision.image_size // self.vision.patch_size

    @classmethod
    def read(cls, folder: Path) -> BagelConfig:
        """Read the configuration of a model folder, with or without weights in it.

        The position tables are as long as the weights say. Where there are no weights they are as long as the
        published model's.

        Args:
            folder: Holds ``config.json``, ``llm_config.json`` and ``vit_config.json``.

        Raises:
            CheckpointFormatError: A file or key is missing, or asks for what this architecture is not.
        """
        root_path = folder / "config.json"
        root = read_json(root_path)
        if root.get("model_type") != "bagel":
            raise CheckpointFormatError(f"{root_path}: model_type: must be 'bagel', not {root.get('model_type')!r}")
        text_path, vision_path = folder / "llm_config.json", folder / "vit_config.json"
        text, vision = read_json(text_path), read_json(vision_path)
        _require(text, text_path, {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False})
        # Not asked for: tie_word_embeddings, qk_norm and rope, which the authors' code sets whatever the files say.
        _require(vision, vision_path, {"hidden_act": "gelu_pytorch_tanh"})
        vae = root.get("vae_config") or {}
        if not isinstance(vae, Mapping):
            raise CheckpointFormatError(f"{root_path}: vae_config: must be a mapping, not {vae!r}")
        channels = _number(vae, "z_channels", _LATENT_CHANNELS, root_path)
        patch_size = _number(root, "latent_patch_size", _LATENT_PATCH_SIZE, root_path)
        tensors = read_tensors(folder)

        def rows(name: str, default: int) -> int:
            return tensors[name].shape[0] if name in tensors else default

        return cls(
            text=_parse(TextConfig, text, text_path),
            vision=_parse(VisionConfig, vision, vision_path),
            latent_patch_size=int(patch_size),
            latent_dim=int(channels * patch_size**2),
            latent_positions=rows("latent_pos_embed.pos_embed", _LATENT_POSITIONS),
            image_positions=rows("vit_pos_embed.pos_embed", _IMAGE_POSITIONS),
        )


def _require(config: Mapping[str, Any], path: Path, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if config.get(key, value) != value:
            raise CheckpointFormatError(f"{path}: {key}: {config[key]!r} is not supported, only {value!r} is")


def _parse(kind: type[_Config], config: Mapping[str, Any], path: Path) -> _Config:
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in config and field.default is MISSING:
            raise CheckpointFormatError(f"{path}: {field.name}: is missing; download the file again")
        value = _number(config, field.name, field.default, path)
        if field.type == "int" and not isinstance(value, int):
            raise CheckpointFormatError(f"{path}: {field.name}: must be an integer, not {value!r}")
        found[field.name] = value
    parsed = kind(**found)
    divisors = [("hidden_size", "num_attention_heads")]
    if isinstance(parsed, TextConfig):
        divisors.append(("num_attention_heads", "num_key_value_heads"))
    for whole, part in divisors:
        if found[whole] % found[part]:
            raise CheckpointFormatError(f"{path}: {part}: {found[part]} does not divide {whole} {found[whole]}")
    return parsed


def _number(config: Mapping[str, Any], key: str, default: Any, path: Path) -> int | float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointFormatError(f"{path}: {key}: must be a positive number, not {value!r}")
    return value
