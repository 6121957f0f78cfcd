"""Reading single tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from quantkit.checkpoint import TensorInfo

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
