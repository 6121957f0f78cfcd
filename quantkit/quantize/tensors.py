"""Tensors of safetensors files, read and written in blocks, so that memory never depends on a file's size.

Files are read and written, not mapped: mapped pages count as the process's own until the kernel wants them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantkit.errors import CheckpointError
from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# As float32 about what a core's own cache holds; smaller blocks are all overhead.
_BLOCK_ELEMENTS = 1 << 19
# A row block starts at a multiple of this, where codes of every width fill whole words.
_ROW_STEP = 32
# Each thread holds the packed tensors of one layer; more threads than this wait for the disk anyway.
_MAX_THREADS = 16
_TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_SAFETENSORS_DTYPES = {spelled: name for name, spelled in _TORCH_DTYPES.items()}
_CHECKED_DTYPES = {"F64", "F32", "F16", "BF16"}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that safetensors spells so, e.g. ``BF16``."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[name])
    return dtype


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own."""
    elements = math.prod(info.shape)
    return next(_read(info, max(elements, 1)), _empty(info, 0)).view(info.shape)


def read_blocks(info: TensorInfo) -> Iterator[Tensor]:
    """Read a tensor in order, in flat blocks.

    Raises:
        CheckpointError: If it holds NaN or infinity.
    """
    for block in _read(info, _BLOCK_ELEMENTS):
        check_finite(info, block)
        yield block


def check_finite(info: TensorInfo, block: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        info: The tensor that the block is a part of; integers and 8-bit floats pass unseen.
        block: Not empty.

    Raises:
        CheckpointError: If the block holds a value that is not finite.
    """
    import torch

    if info.dtype not in _CHECKED_DTYPES:
        return
    low, high = torch.aminmax(block)  # both are NaN if any value is
    if not math.isfinite(low) or not math.isfinite(high):
        raise CheckpointError(f"{info.file}: {info.name}: holds NaN or infinity; copy the model again")


def read_rows(info: TensorInfo) -> Iterator[tuple[slice, Tensor]]:
    """Read a matrix (N, K) in order, in blocks of rows.

    Yields:
        Which rows, starting at a multiple of 32, and the rows (n, K).
    """
    rows, columns = info.shape
    step = max(_BLOCK_ELEMENTS // columns // _ROW_STEP, 1) * _ROW_STEP
    for index, block in enumerate(_read(info, step * columns)):
        yield slice(index * step, min((index + 1) * step, rows)), block.view(-1, columns)


def _read(info: TensorInfo, elements: int) -> Iterator[Tensor]:
    import torch

    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        left = math.prod(info.shape)
        while left:
            block = _empty(info, min(elements, left))
            view = block.view(torch.uint8).numpy().data
            while view:
                if not (count := file.readinto(view)):
                    raise CheckpointError(f"{info.file}: {info.name}: became shorter while it was read")
                view = view[count:]
            left -= len(block)
            yield block


def _empty(info: TensorInfo, elements: int) -> Tensor:
    import torch

    return torch.empty(elements, dtype=torch_dtype(info.dtype))


def are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN equals itself, and -0 differs from 0."""
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(_read(one, _BLOCK_ELEMENTS), _read(other, _BLOCK_ELEMENTS), strict=True)
    return all(torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in pairs)


class TensorFile:
    """A safetensors file that is written tensor by tensor, in any order and by any number of threads.

    Its header is complete from the start. Larger elements stand first, as in files of the safetensors library, so
    that every tensor is aligned to its own.

    Args:
        path: The file to make; everyone may read it.
        layout: Shape and dtype of every tensor by name.

    Raises:
        OSError: If the file cannot be written, for example on a full disk.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, dtype) in sorted(layout.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            spans[name] = start, end
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._spans = {name: (data + start, data + stop) for name, (start, stop) in spans.items()}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.fchmod(self._descriptor, 0o644)  # whatever the umask
        _write(self._descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write one tensor from consecutive parts of it.

        Raises:
            OSError: If the file cannot be written.
        """
        import torch

        offset, end = self._spans[name]
        for block in blocks:
            data = block.contiguous().view(-1).view(torch.uint8).numpy().data
            _write(self._descriptor, data, offset)
            offset += len(data)
        assert offset == end, name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


@contextmanager
def open_threads() -> Iterator[ThreadPoolExecutor]:
    """Open threads that each work on a tensor of their own; torch computes in the thread that asks it to.

    There is one more than torch would use, as one mostly waits for the disk.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # holds for the threads that begin after it, too
    pool = ThreadPoolExecutor(min(before + 1, _MAX_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
