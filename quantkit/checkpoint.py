"""What a model folder holds, read from its JSON files and safetensors headers alone.

Nothing here imports torch or reads a weight, so that plans, inspection and bad-input checks stay fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

# Bytes per element of every dtype that safetensors can hold.
DTYPE_BYTES: Mapping[str, float] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it is and what it is."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it, e.g. ``BF16``."""
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True)
class Component:
    """One entry of a pipeline's ``model_index.json``, e.g. the transformer."""

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
    def quantization(self) -> dict[str, Any] | None:
        """The component's ``quantization_config``, if it is quantized."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Pipeline:
    """A folder in diffusers' layout."""

    folder: Path
    class_name: str
    components: Mapping[str, Component]

    @property
    def other_files(self) -> list[Path]:
        """Files that belong to no component, such as ``model_index.json`` and a model card."""
        inside = {component.folder for component in self.components.values()}
        return [path for path in walk_files(self.folder) if not inside.intersection(path.parents)]


def open_pipeline(folder: Path) -> Pipeline:
    """Read what a pipeline folder holds.

    Raises:
        CheckpointError: If the folder or its ``model_index.json`` is missing or damaged, or a component's
            folder is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise CheckpointError(f"{folder}: has no model_index.json; give the root of a diffusers pipeline")
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
        components[name] = Component(name, entry[0], entry[1], folder / name)
    return Pipeline(folder, class_name, components)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return data


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in a fixed order; hidden files and folders are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk_files(path)
        else:
            yield path


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of a component's weights, in sharded or single-file form.

    Returns:
        Every tensor by name; empty if the folder holds no weights.

    Raises:
        CheckpointError: If a file is truncated or damaged, a shard is missing, the index names a tensor that
            its shard does not hold (or the reverse), or the weights are in pickle form.
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _read_sharded(folder, index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return read_header(single)
    pickled = [path.name for path in walk_files(folder) if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    if pickled:
        raise CheckpointError(f"{folder / pickled[0]}: is in pickle form; convert it to safetensors")
    return {}


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: is missing or empty")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: weight_map: {shard!r} is no file name")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        held = read_header(folder / shard)
        if twice := sorted(held.keys() & tensors.keys()):
            raise CheckpointError(f"{folder / shard}: {twice[0]}: {tensors[twice[0]].file.name} holds it too")
        tensors |= held
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{folder / shard}: lacks the tensor {name} that {index.name} places there")
    if unnamed := sorted(tensors.keys() - weight_map.keys()):
        raise CheckpointError(f"{index}: weight_map: does not name {unnamed[0]}, which a shard holds")
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: If the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: is truncated or no safetensors file; copy it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged; copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is damaged; copy it again")
    tensors = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
                dtype in DTYPE_BYTES
                and all(type(length) is int and length >= 0 for length in shape)
                and stop - start == math.prod(shape) * DTYPE_BYTES[dtype]
            ):
                tensors[name] = TensorInfo(name, path, dtype, tuple(shape), stop - start, 8 + length + start)
                spans.append((start, stop))
            case _:
                raise CheckpointError(f"{path}: {name}: dtype, shape and size do not agree; copy the file again")
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps; copy the file again")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: is truncated: {size} bytes where its header says {8 + length + end}; copy it again"
        )
    return tensors
