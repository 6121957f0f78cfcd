"""What a model folder holds, read from its JSON files and safetensors headers alone.

Nothing here imports torch or reads a weight, so that plans, inspection and bad-input checks stay fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit_runtime import checkpoint
from quantkit_runtime.checkpoint import TensorInfo
from quantkit_runtime.config import find_quantization
from quantkit_runtime.errors import CheckpointFormatError

SINGLE_MODEL = "model"
"""Name of the one component of a model that is no pipeline."""

# A tokenizer has one of these, depending on its class and age; ByT5 reads bytes and needs none.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_WITHOUT_WEIGHTS = ("Processor", "ProcessorFast", "FeatureExtractor")


@dataclass(frozen=True)
class Component:
    """One entry of a pipeline's ``model_index.json``, e.g. the transformer; or a single model as a whole."""

    name: str
    library: str
    class_name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The component's ``config.json``; empty if it has none."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name; empty if the component has no weights."""
        return read_tensors(self.folder)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the component."""
        return sum(path.stat().st_size for path in walk_files(self.folder))

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def find_missing(self) -> str | None:
        """Say what is missing without which no library loads the component; None if nothing is known to be."""
        needed: tuple[str, ...]
        if self.class_name.endswith("Scheduler"):
            needed = ("scheduler_config.json",)
        elif "Tokenizer" in self.class_name:
            needed = ("tokenizer_config.json",) if self.class_name.startswith("ByT5") else _VOCABULARIES
        elif self.library not in ("diffusers", "transformers") or self.class_name.endswith(_WITHOUT_WEIGHTS):
            return None
        else:
            needed = ("config.json",)
        if not any(any(self.folder.glob(name)) for name in needed):
            return f"{self.folder / needed[0]}: is missing"
        if needed == ("config.json",) and not self.tensors:
            return f"{self.folder}: has a config.json but no weights"
        return None

    def check_described(self) -> None:
        """Check that packed weights are said to be packed: nothing could read them otherwise.

        Raises:
            CheckpointError: If they are not, as when ``config.json`` was lost.
        """
        if self.quantization is None and any(name.endswith(".qweight") for name in self.tensors):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: has no quantization_config, but the weights are packed; "
                "copy the checkpoint again"
            )

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The component's ``quantization_config``, if it is quantized.

        Raises:
            CheckpointError: If its ``config.json`` holds several that differ.
        """
        try:
            found = find_quantization(self.config)
        except CheckpointFormatError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from error
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class ModelFolder:
    """A model folder: a pipeline in diffusers' layout, or a single model, which is its only component."""

    folder: Path
    class_name: str
    components: Mapping[str, Component]
    config: Mapping[str, Any] = field(default_factory=dict)
    """What ``model_index.json`` says beside its components, e.g. ``boundary_ratio``."""

    @property
    def index_file(self) -> str:
        """Name of the file by which its folder shows that it is a model."""
        return "config.json" if SINGLE_MODEL in self.components else "model_index.json"

    @property
    def other_files(self) -> list[Path]:
        """Files that belong to no component, such as ``model_index.json`` and a model card."""
        inside = {component.folder for component in self.components.values()}
        return [path for path in walk_files(self.folder) if not inside.intersection(path.parents)]


def open_model(folder: Path) -> ModelFolder:
    """Read what a model folder holds: a diffusers pipeline, or a single model with its ``config.json`` in the root.

    Raises:
        CheckpointError: If the folder is missing or no model, its ``model_index.json`` or ``config.json`` is
            damaged, or a component's folder is missing or empty.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        return _open_single_model(folder)
    index = read_json(index_path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{index_path}: _class_name: is missing; this is no diffusers pipeline")
    components = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise CheckpointError(f"{index_path}: {name}: must be [library, class], not {entry}")
        if Path(name).name != name:  # an absolute or climbing path would reach beyond the folder
            raise CheckpointError(f"{index_path}: {name}: is no folder name; download the model again")
        if not (folder / name).is_dir():
            raise CheckpointError(f"{index_path}: {name}: its folder is missing; download the model again")
        if not any((folder / name).iterdir()):
            raise CheckpointError(f"{index_path}: {name}: its folder is empty; download the model again")
        components[name] = Component(name, entry[0], entry[1], folder / name)
    config = {name: entry for name, entry in index.items() if not isinstance(entry, list)}
    return ModelFolder(folder, class_name, components, config)


def _open_single_model(folder: Path) -> ModelFolder:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder}: has neither model_index.json nor config.json; give the root of a diffusers pipeline or "
            "transformers model"
        )
    config = read_json(config_path)
    if "_class_name" in config:
        raise CheckpointError(f"{folder}: is one component of a pipeline; give the pipeline's root")
    match config:
        case {"architectures": [str(class_name), *_]} | {"model_type": str(class_name)}:
            component = Component(SINGLE_MODEL, "transformers", class_name, folder)
            return ModelFolder(folder, class_name, {SINGLE_MODEL: component})
    raise CheckpointError(f"{config_path}: architectures: is missing; it must name the model's class")


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in a fixed order; hidden files and folders are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk_files(path)
        else:
            yield path


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    with _as_checkpoint_error():
        return checkpoint.read_json(path)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of a component's weights, in sharded or single-file form.

    Returns:
        Every tensor by name; empty if the folder holds no weights.

    Raises:
        CheckpointError: See `quantkit_runtime.checkpoint.read_tensors`.
    """
    with _as_checkpoint_error():
        return checkpoint.read_tensors(folder)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: If the file is missing, truncated or no safetensors file.
    """
    with _as_checkpoint_error():
        return checkpoint.read_header(path)
