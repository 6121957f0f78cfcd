"""The files of one model folder: JSON, safetensors headers, and the tensors behind them.

What a folder holds is read from headers alone; neither torch nor a weight is touched before `WeightFiles.read`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_runtime.errors import CheckpointFormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Bytes per element of every dtype that safetensors can hold.
DTYPE_BYTES: Mapping[str, float] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# diffusers' and transformers' own names, in this order; auto-round writes the second one for both.
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
# BAGEL's own names: the model, and beside it the VAE. Its first copies have no index.
_BAGEL_FILES = ("ema.safetensors", "ae.safetensors")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointFormatError: If the file is missing or holds anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointFormatError(f"{path}: is no JSON object")
    return data


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of a component's weights, in sharded or single-file form.

    Returns:
        Every tensor by name; empty if the folder holds no weights.

    Raises:
        CheckpointFormatError: If a file is truncated or damaged, a shard is missing, the index names a tensor that
            its shard does not hold (or the reverse), or the weights are in pickle form.
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _read_sharded(folder, index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return read_header(single)
    if (folder / _BAGEL_FILES[0]).is_file():
        return _read_together(folder / name for name in _BAGEL_FILES if (folder / name).is_file())
    pickled = sorted(path for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointFormatError(f"{pickled[0]}: is in pickle form; convert it to safetensors")
    return {}


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index}: weight_map: is missing or empty")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointFormatError(f"{index}: weight_map: {shard!r} is no file name")
    tensors = _read_together(folder / shard for shard in sorted(set(weight_map.values())))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointFormatError(f"{folder / shard}: lacks the tensor {name} that {index.name} places there")
    if unnamed := sorted(tensors.keys() - weight_map.keys()):
        raise CheckpointFormatError(f"{index}: weight_map: does not name {unnamed[0]}, which a shard holds")
    return tensors


def _read_together(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        held = read_header(file)
        if twice := sorted(held.keys() & tensors.keys()):
            raise CheckpointFormatError(f"{file}: {twice[0]}: {tensors[twice[0]].file.name} holds it too")
        tensors |= held
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointFormatError: If the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointFormatError(f"{path}: is truncated or no safetensors file; copy it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path}: its safetensors header is damaged; copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointFormatError(f"{path}: its safetensors header is damaged; copy it again")
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
                raise CheckpointFormatError(
                    f"{path}: {name}: dtype, shape and size do not agree; copy the file again"
                )
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointFormatError(f"{path}: its tensors overlap or leave gaps; copy the file again")
        end = stop
    if 8 + length + end != size:
        raise CheckpointFormatError(
            f"{path}: is truncated: {size} bytes where its header says {8 + length + end}; copy it again"
        )
    return tensors


class WeightFiles:
    """The tensors of a model folder: one safetensors file, or several and their index.

    Opening checks every file's header against its length, so damage shows before any weight is read.

    Attributes:
        folder: The model folder.
        tensors: Every tensor by name.

    Raises:
        CheckpointFormatError: No safetensors file, one that the index names is missing or damaged, or index and
            files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_tensors(folder)
        if not self.tensors:
            raise CheckpointFormatError(
                f"{folder}: holds no safetensors weights; save the model with safe_serialization=True"
            )

    def read(
        self, device: torch.device, takes: Mapping[str, Callable[[Any], Tensor]] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name; on the CPU the data stays in the memory-mapped file until used.

        Args:
            device: Where the tensors go.
            takes: By name, what reads a part of a tensor, given its slice as `safetensors` has it.
        """
        from safetensors import safe_open

        takes = takes or {}

        for path in sorted({info.file for info in self.tensors.values()}):
            _read_ahead(path)
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    take = takes.get(name)
                    yield name, file.get_tensor(name) if take is None else take(file.get_slice(name))

    def where(self, name: str) -> Path:
        """File that holds the tensor ``name``."""
        return self.tensors[name].file


def _read_ahead(path: Path) -> None:
    """Have the system read a whole file while it is being used; page by page, in any order, it takes far longer."""
    if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
