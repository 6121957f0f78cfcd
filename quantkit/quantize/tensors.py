"""Reading single tensors of a checkpoint, and writing files of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor; it is backed by the memory-mapped file until it is changed."""
    return next(read_tensors(iter([info])))[1]


def read_tensors(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Read tensors one after the other, opening each file once per run of tensors that it holds."""
    from safetensors import safe_open

    for file, members in groupby(infos, key=lambda info: info.file):
        with safe_open(file, framework="pt") as handle:
            for info in members:
                yield info, handle.get_tensor(info.name)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that everyone may read.

    Raises:
        OSError: If the file cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # all it keeps of the system's error is its text
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    path.chmod(0o644)  # safetensors leaves it readable by its owner alone
