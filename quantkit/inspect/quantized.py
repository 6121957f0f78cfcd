"""The quantized models of a checkpoint as a serving engine meets them: metadata, packed layers, names.

Everything comes from JSON files and safetensors headers; broken metadata is kept as it is, for the rules to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint import Component, ModelFolder, open_model, read_json, read_tensors
from quantkit.errors import CheckpointError, UnsupportedModelError
from quantkit.families.base import Family
from quantkit.families.registry import detect
from quantkit.families.serving import VllmOmni

if TYPE_CHECKING:
    from quantkit_runtime.checkpoint import TensorInfo
    from quantkit_runtime.config import QuantizationConfig, Scheme

Layout = Literal["diffusers", "transformers"]
KEY = "quantization_config"
PACKED_SUFFIXES = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class QuantizedModel:
    """A model with a ``quantization_config``: a component of a pipeline, or one stage of a model folder.

    Attributes:
        name: The component or the stage; the folder's name for a model without stages.
        library: Whose class it is, ``diffusers`` or ``transformers``.
        config_path: The ``config.json`` that holds the metadata.
        key: Where in it, e.g. ``thinker_config.text_config.quantization_config``.
        config: The metadata, as it stands there.
        tensors: Every tensor of the model by name.
        engine: How vLLM-Omni names and shards its Linears; the checkpoint's names if that is not known.
    """

    name: str
    library: str
    config_path: Path
    key: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    engine: VllmOmni = field(default_factory=VllmOmni)

    @cached_property
    def packed(self) -> dict[str, dict[str, TensorInfo]]:
        """The tensors of each packed layer, by the layer's name and the tensor's suffix."""
        layers: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            layer, _, suffix = name.rpartition(".")
            if suffix in PACKED_SUFFIXES:
                layers.setdefault(layer, {})[suffix] = info
        return layers

    @cached_property
    def unpacked(self) -> list[str]:
        """Linears in 16 bit. Of matrices called ``weight`` only embeddings are others, and blocks have none."""
        suffix = ".weight"
        names = (
            name.removesuffix(suffix)
            for name, info in self.tensors.items()
            if name.endswith(suffix) and len(info.shape) == 2
        )
        return [name for name in names if name not in self.packed]

    @cached_property
    def quantization(self) -> QuantizationConfig | None:
        """The metadata's layer choice and schemes; None if it is too broken to tell.

        What only says whether an engine takes it (method, packing, activations ...) is left to the rules.
        """
        from quantkit_runtime.config import PACKING_FORMATS, QuantizationConfig
        from quantkit_runtime.errors import CheckpointFormatError

        extra = self.config.get("extra_config") or {}
        keys = ("bits", "group_size", "sym")
        readable: dict[str, Any] = {
            "quant_method": "auto-round",
            **{key: self.config.get(key) for key in keys},
            "block_name_to_quantize": self.config.get("block_name_to_quantize"),
        }
        if self.config.get("packing_format") in PACKING_FORMATS:
            readable["packing_format"] = self.config["packing_format"]
        try:
            readable["extra_config"] = {
                name: {key: value for key, value in settings.items() if key in keys}
                for name, settings in extra.items()
            }
            return QuantizationConfig.from_dict(readable)
        except (AttributeError, CheckpointFormatError):  # the rules about metadata tell
            return None

    def scheme_of(self, layer: str) -> Scheme | None:
        """Return the scheme that the metadata gives a layer of the checkpoint; None for 16 bit."""
        return self.quantization.scheme_for(layer) if self.quantization is not None else None

    @cached_property
    def stored(self) -> dict[str, Scheme]:
        """The packed layers that the metadata lists, each with its scheme."""
        schemes = {name: self.scheme_of(name) for name in self.packed}
        return {name: scheme for name, scheme in schemes.items() if scheme is not None}

    @property
    def blocks(self) -> tuple[str, ...]:
        """The listed blocks; empty if there are none or they cannot be read."""
        return (self.quantization.blocks or ()) if self.quantization is not None else ()

    def in_blocks(self, layer: str) -> bool:
        """Whether a layer is within a listed block, not merely called alike."""
        return any(layer.startswith(f"{block}.") for block in self.blocks)

    def features(self, layer: str) -> tuple[int, int] | None:
        """Return in_features K and out_features N of a packed layer; None if tensors of it are missing."""
        tensors, scheme = self.packed[layer], self.scheme_of(layer)
        if scheme is None or len(tensors) < len(PACKED_SUFFIXES):
            return None
        if any(len(info.shape) != 2 for info in tensors.values()):
            return None
        rows = tensors["qweight"].shape[0]
        awq = scheme.packing_format == "auto_round:auto_awq"
        return (rows if awq else rows * 32 // scheme.bits), tensors["scales"].shape[1]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is to be served.

    Attributes:
        folder: Its root.
        layout: Whose layout it has.
        architecture: Class of the pipeline or type of the model.
        engine: How vLLM-Omni builds it; None if that is not known.
        models: What is quantized in it, as far as it can be read.
        components: Every component of a pipeline by name; empty in transformers' layout.
        damage: One line for each file or component that is missing or damaged.
        misplaced: Every ``quantization_config`` that stands where no loader looks, by file and key.
        tensors: Every tensor in transformers' layout, of stages that are not quantized, too; empty for a pipeline.
    """

    folder: Path
    layout: Layout
    architecture: str
    engine: VllmOmni | None
    models: tuple[QuantizedModel, ...]
    components: Mapping[str, Component] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    misplaced: tuple[str, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read what is quantized in a folder, be it a pipeline or a single model.

    Raises:
        CheckpointError: If the folder is no model at all, or nothing in it is quantized.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / "model_index.json").is_file():
        checkpoint = _open_pipeline(folder)
    elif (folder / "config.json").is_file():
        checkpoint = _open_single_model(folder)
    else:
        raise CheckpointError(f"{folder}: has neither model_index.json nor config.json; give the root of a model")
    if not (checkpoint.models or checkpoint.damage or checkpoint.misplaced):
        raise CheckpointError(f"{folder}: nothing in it has a {KEY}; it is not quantized")
    return checkpoint


def _open_pipeline(folder: Path) -> Checkpoint:
    try:
        opened = open_model(folder)
    except CheckpointError as error:
        return Checkpoint(folder, "diffusers", "", None, (), damage=(str(error),))
    family = _family_of(opened)
    models, damage = [], []
    for component in opened.components.values():
        try:
            tensors, missing = component.tensors, component.find_missing()
        except CheckpointError as error:
            damage.append(str(error))
            continue
        if missing is not None:
            damage.append(f"{missing}; copy the component again")
        elif component.quantization is not None:
            path = component.folder / "config.json"
            models.append(
                QuantizedModel(
                    *(component.name, component.library, path, KEY, component.quantization, tensors),
                    (family and family.engine_of(component)) or VllmOmni(),
                )
            )
    engine = family.vllm_omni if family is not None else None
    return Checkpoint(
        folder, "diffusers", opened.class_name, engine, tuple(models), opened.components, tuple(damage)
    )


def _family_of(model: Path | ModelFolder) -> Family | None:
    try:
        return detect(model)
    except (CheckpointError, UnsupportedModelError):
        return None


def _open_single_model(folder: Path) -> Checkpoint:
    path = folder / "config.json"
    config = read_json(path)
    architecture = str(config.get("model_type", ""))
    family = _family_of(folder)
    engine = family.vllm_omni if family is not None else None
    damage: tuple[str, ...] = ()
    tensors: Mapping[str, TensorInfo] = {}
    try:
        tensors = read_tensors(folder)
        if not tensors:
            damage = (f"{folder}: has a config.json but no weights; copy the model again",)
    except CheckpointError as error:
        damage = (str(error),)
    found = dict(_find_metadata(config))
    stages = [key for key in found if key.split(".")[-2:-1] == ["text_config"] and key.count(".") <= 2]
    read = stages or [key for key in found if key == KEY]
    models = []
    for key in read if not damage else ():
        stage = key.split(".")[0].removesuffix("_config") if key.count(".") == 2 else ""
        own = {name: info for name, info in tensors.items() if stage and name.startswith(f"{stage}.")}
        models.append(
            QuantizedModel(
                *(stage or folder.resolve().name, "transformers", path, key, found[key], own or tensors),
                engine or VllmOmni(),
            )
        )
    misplaced = tuple(f"{path}: {key}" for key in found if key not in read and key != KEY)
    return Checkpoint(folder, "transformers", architecture, engine, tuple(models), {}, damage, misplaced, tensors)


def _find_metadata(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every ``quantization_config`` of a configuration with the dotted path to it."""
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        if key == KEY:
            yield f"{prefix}{key}", value
        else:
            yield from _find_metadata(value, f"{prefix}{key}.")
