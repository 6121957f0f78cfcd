"""Safetensors files of one model folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit_runtime.errors import CheckpointFormatError

# diffusers' and transformers' own names, in this order; auto-round writes the second one for both.
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointFormatError: The file is missing, unreadable or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointFormatError(
            f"{path}: cannot be read ({error.strerror}); download the model again"
        ) from error
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: not valid JSON ({error}); download the model again") from error
    if not isinstance(data, dict):
        raise CheckpointFormatError(f"{path}: not a JSON object; download the model again")
    return data


class WeightFiles:
    """The tensors of a model folder: one safetensors file, or several and their index.

    Opening checks every file's header against its length, so damage shows before any weight is read.

    Attributes:
        folder: The model folder.
        shapes: Shape of each tensor by name.

    Raises:
        CheckpointFormatError: No safetensors file, one that the index names is missing or damaged, or index and
            files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = self._index()
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted({folder / name for name in index.values()}) if index else [self._single_file()]:
            with _open(path, "cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self._file_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        for name, file_name in index.items():
            if self._file_of.get(name) != folder / file_name:
                raise CheckpointFormatError(
                    f"{folder / file_name}: has no tensor {name}, which the index places there; download the model "
                    "again"
                )

    def read(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name; on the CPU the data stays in the memory-mapped file until used."""
        for path in sorted(set(self._file_of.values())):
            with _open(path, str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)

    def where(self, name: str) -> Path:
        """File that holds the tensor ``name``."""
        return self._file_of[name]

    def _index(self) -> Mapping[str, str]:
        for stem in _WEIGHT_STEMS:
            path = self.folder / f"{stem}.safetensors.index.json"
            if path.is_file():
                weight_map = read_json(path).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise CheckpointFormatError(f"{path}: weight_map: missing or empty; download the model again")
                return weight_map
        return {}

    def _single_file(self) -> Path:
        for stem in _WEIGHT_STEMS:
            path = self.folder / f"{stem}.safetensors"
            if path.is_file():
                return path
        raise CheckpointFormatError(
            f"{self.folder}: no safetensors weights found; other formats are not read, save the model with "
            "safe_serialization=True"
        )


def _open(path: Path, device: str) -> Any:
    try:
        return safe_open(path, framework="pt", device=device)
    except FileNotFoundError as error:
        raise CheckpointFormatError(f"{path}: missing, though the index names it; download it again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointFormatError(f"{path}: truncated or damaged ({error}); download it again") from error
