"""Starting the kernel of `quantkit_runtime.kernels.hopper`: whom it serves, and how large its programs are.

Legend: M = rows, N = out_features, K = in_features, G = groups, B = tiles along K, E = experts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit_runtime.kernels.tiles import PART, TILE

CAPABILITY = (9, 0)
"""Of Hopper; other generations have other instructions in place of wgmma."""
ALIGNMENT = 16
"""Bytes that the address of what TMA copies is a multiple of; views of larger tensors may begin elsewhere."""
_WARPS_OF_A_GROUP = 4
_GROUPS = 2
_MOST_SHARES = 4
_ADDED_PER_US = 375e3


@dataclass(frozen=True)
class _Shape:
    """How a program works on a block of so many rows.

    Attributes:
        stages: Tiles in shared memory at a time.
        tile_us: Microseconds for one tile of an H100; only their relation matters.
    """

    stages: int
    tile_us: float


_SHAPES = {64: _Shape(4, 0.65), 128: _Shape(5, 0.80), 256: _Shape(3, 1.36)}
MIN_ROWS = 33
"""Up to how many rows the kernel of few rows is as fast."""


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Whether a device has the instructions, and the installed Triton the language to write them in."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) == CAPABILITY
        and _has_gluon()
    )


def _has_gluon() -> bool:
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def fits(in_features: int, out_features: int, group: int) -> bool:
    """Whether the kernel serves weights of this shape: TMA copies whole tiles, and 16 bytes of scales at a time."""
    return in_features % TILE == 0 and out_features % 8 == 0 and group % TILE == 0


def multiply(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, counters: Tensor,
    group: int, multiprocessors: int,
) -> Tensor:  # fmt: skip
    """Multiply rows with packed weights.

    Args:
        x: (M, K) contiguous.
        tiles: (B, N, 16).
        scales: (G, N).
        zeros: (G, N) or None.
        bias: (N,) or None.
        counters: int32, all 0.
        group: Input features per group; 0 if a group is a whole row of the weight.
        multiprocessors: Of the device.

    Returns:
        (M, N).
    """
    rows, out_features = x.shape[0], tiles.shape[1]
    block, split = _plan(rows, out_features, tiles.shape[0], counters.numel(), multiprocessors)
    blocks, parts = -(-rows // block), -(-out_features // PART)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    partial = out if split == 1 else torch.empty(split * blocks * parts * block * PART, device=x.device)
    _start(
        x, tiles, scales, zeros, bias, out, block, (blocks * parts, split), partial=partial, counters=counters,
        group=group,
    )  # fmt: skip
    return out


def multiply_sorted(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, expert: Tensor, start: Tensor,
    block: int,
) -> Tensor:  # fmt: skip
    """Multiply rows that are sorted by expert with the weights of each one's expert.

    Args:
        x: (M, K) contiguous.
        tiles: (E, B, N, 16).
        scales: (E, G, N).
        zeros: (E, G, N) or None.
        group: As above.
        expert: (blocks,) int32, whose a block is; at least E for one that is nobody's.
        start: (blocks + E,) int32, the first row of a block, and where each expert's rows end.
        block: Rows of a block at most: 64, 128 or 256.

    Returns:
        (M, N); rows that no block holds are 0.
    """
    out = torch.zeros(x.shape[0], tiles.shape[2], dtype=x.dtype, device=x.device)
    grid = (expert.numel() * -(-tiles.shape[2] // PART), 1)
    _start(x, tiles, scales, zeros, None, out, block, grid, group=group, expert=expert, start=start)
    return out


def block_rows(rows: float) -> int:
    """Return how many rows a block should have where an expert gets so many on average."""
    return next((block for block in _SHAPES if rows <= block), max(_SHAPES))


def _start(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, out: Tensor, block: int,
    grid: tuple[int, int], *, group: int, partial: Tensor | None = None, counters: Tensor | None = None,
    expert: Tensor | None = None, start: Tensor | None = None,
) -> None:  # fmt: skip
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit_runtime.kernels.hopper import multiply_kernel

    of_x, of_words, of_scales = _layouts()

    rows, in_features = x.shape
    out_features, groups = out.shape[1], scales.shape[-2]
    words, scales = tiles.view(-1, tiles.shape[-1]), scales.view(-1, out_features)
    multiply_kernel[grid](
        TensorDescriptor.from_tensor(x, [block, TILE], of_x),
        TensorDescriptor.from_tensor(words, [PART, words.shape[1]], of_words),
        TensorDescriptor.from_tensor(scales, [1, PART], of_scales),
        scales if zeros is None else zeros, scales if bias is None else bias, out,
        out if partial is None else partial, out if counters is None else counters,
        out if expert is None else expert, out if start is None else start,
        rows, out_features, in_features, groups,
        -(-rows // block) if expert is None else expert.numel(), 1 if expert is None else tiles.shape[0],
        GROUP=group, ASYM=zeros is not None, BIAS=bias is not None, EXPERTS=expert is not None, BM=block, BN=PART,
        STAGES=_SHAPES[block].stages, SPLIT=grid[1], num_warps=_WARPS_OF_A_GROUP,
    )  # fmt: skip


@lru_cache
def _layouts() -> tuple[Any, Any, Any]:
    """Return how tiles of x, of words and of scales lie in shared memory: swizzled over a row, or not at all."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return tuple(NVMMASharedLayout(row_bytes, bits, 2) for row_bytes, bits in ((128, 16), (64, 32), (0, 16)))


@lru_cache(maxsize=4096)
def _plan(rows: int, out_features: int, tiles: int, counters: int, multiprocessors: int) -> tuple[int, int]:
    """Return the rows of a block and the shares of K that take the least time.

    A multiprocessor holds one program at a time, so what counts is how often all of them come round.
    """
    best = (float("inf"), 0, 0)
    for block, shape in _SHAPES.items():
        programs = -(-rows // block) * -(-out_features // PART)
        for shares in range(1, _MOST_SHARES + 1):
            share = -(-tiles // shares)
            if -(-tiles // share) < shares or (shares > 1 and programs * _GROUPS > counters):
                continue
            rounds = -(-programs * shares // multiprocessors)
            adding_up_us = 0.0 if shares == 1 else 1.0 + shares * (0.5 + rows * out_features / _ADDED_PER_US)
            best = min(best, (rounds * share * shape.tile_us + adding_up_us, block, shares))
    return best[1:]
