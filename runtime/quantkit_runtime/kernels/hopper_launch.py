"""Starting the kernel of `quantkit_runtime.kernels.hopper`: whom it serves, and how large its programs are.

Legend: M = rows, N = out_features, K = in_features, G = groups, B = tiles along K, E = experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.kernels.start import run_kernel
from quantkit_runtime.kernels.tiles import PART, SLICE, TILE

CAPABILITY = (9, 0)
"""Of Hopper; other generations have other instructions in place of wgmma."""
_ALIGNMENT = 16  # bytes, of what TMA copies; views of larger tensors may begin elsewhere
_WARPS_OF_A_GROUP = 4
_MOST_SHARES = 4  # of a part; more were not tried

STAGES = {64: 4, 128: 5, 256: 3}
"""Tiles in shared memory at a time, by the rows of a part."""


@dataclass(frozen=True)
class Plan:
    """How the parts of a result are given to programs, see `quantkit_runtime.kernels.hopper.multiply_kernel`.

    Attributes:
        block: Rows of a part.
        rounds: Parts that each program has for itself.
        shared: Parts that are left.
        sharers: Programs that have an equal share of those.
        programs: In all.
    """

    block: int
    rounds: int
    shared: int
    sharers: int
    programs: int


@dataclass(frozen=True)
class Model:
    """What a plan takes, in microseconds; only their relations matter. Three are by the rows of a part.

    Attributes:
        tile_us: For a tile of 128 input features.
        part_us: For the beginning and the end of a part.
        sum_us: For adding what another program left.
        sharing_us: For parts being shared at all.
        unequal: By how much tiles take longer if programs begin anywhere in a part: they read other parts of x at a
            time.
    """

    tile_us: Mapping[int, float]
    part_us: Mapping[int, float]
    sum_us: Mapping[int, float]
    sharing_us: float
    unequal: float

    def time_us(self, plan: Plan, tiles: int) -> float:
        """Return how long a plan takes for so many tiles along K."""
        own, share, others = plan.rounds * tiles, 0.0, 0
        if plan.shared:
            share = -(-plan.shared * tiles // plan.sharers)
            shares, more = divmod(plan.sharers, plan.shared)
            share *= self.unequal if more else 1
            others = shares - (more == 0)
        block, parts = plan.block, plan.rounds + (plan.shared > 0)
        adding_us = self.sharing_us + others * self.sum_us[block] if others else 0.0
        return (own + share) * self.tile_us[block] + parts * self.part_us[block] + adding_us


# Of an H200: eval/perf/hopper_plans.py --fit docs/results/hopper-plans-h200.json, four layers, 64 to 4608 rows.
MODEL = Model(
    tile_us={64: 0.509, 128: 0.726, 256: 1.238},
    part_us={64: 3.16, 128: 2.54, 256: 4.51},
    sum_us={64: 0.65, 128: 1.05, 256: 1.77},
    sharing_us=4.24,
    unequal=1.14,
)
MIN_ROWS = 33
"""Below so many rows the kernel of few rows is as fast."""


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
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, flags: Tensor, group: int,
    plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Multiply rows with packed weights.

    Args:
        x: (M, K) contiguous.
        tiles: (B, N, 16).
        scales: (G, N).
        zeros: (G, N) or None.
        bias: (N,) or None.
        flags: int32, all 0, and 0 again afterwards; no more programs share parts than there are pairs of them.
        group: Input features per group; 0 if a group is a whole row of the weight.
        plan: None for the one that takes the least time; it has no more sharers than there are pairs of flags.

    Returns:
        (M, N).
    """
    rows, out_features = x.shape[0], tiles.shape[1]
    plan = plan or plan_for(rows, out_features, tiles.shape[0], flags.numel() // 2, multiprocessors(x.device))
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    partial = out
    if plan.sharers > plan.shared:
        partial = torch.empty(plan.sharers * plan.block * PART, dtype=torch.float32, device=x.device)
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    _start(x, tiles, scales, zeros, bias, out, plan, partial=partial, flags=flags, group=group)
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
    plan = Plan(block, 1, 0, 0, expert.numel() * -(-tiles.shape[2] // PART))
    _start(x, tiles, scales, zeros, None, out, plan, group=group, expert=expert, start=start)
    return out


def block_rows(rows: float) -> int:
    """Return how many rows a block should have where an expert gets so many on average."""
    return next((block for block in STAGES if rows <= block), max(STAGES))


def _start(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, out: Tensor, plan: Plan, *,
    group: int, partial: Tensor | None = None, flags: Tensor | None = None, expert: Tensor | None = None,
    start: Tensor | None = None,
) -> None:  # fmt: skip
    from quantkit_runtime.kernels.hopper import multiply_kernel

    rows, in_features = x.shape
    out_features, groups = out.shape[1], scales.shape[-2]
    experts = 1 if expert is None else tiles.shape[0]
    run_kernel(
        multiply_kernel,
        (plan.programs, 1),
        (
            scales if zeros is None else zeros, scales if bias is None else bias, out,
            out if partial is None else partial, out if flags is None else flags,
            out if expert is None else expert, out if start is None else start,
        ),
        (out_features, in_features, groups, experts),
        (
            rows, -(-rows // plan.block) if expert is None else expert.numel(), plan.rounds, plan.shared,
            max(plan.sharers, 1),
        ),
        {
            "GROUP": group, "ASYM": zeros is not None, "BIAS": bias is not None, "EXPERTS": expert is not None,
            "BM": plan.block, "BN": PART, "STAGES": STAGES[plan.block],
        },
        warps=_WARPS_OF_A_GROUP,
        described=(
            _descriptor(x.data_ptr(), x.dtype, rows, in_features, plan.block, TILE, 0),
            _descriptor(
                tiles.data_ptr(), tiles.dtype, tiles.numel() // SLICE, SLICE, PART, SLICE, 1
            ),
            _descriptor(scales.data_ptr(), scales.dtype, experts * groups, out_features, 1, PART, 2),
        ),
    )  # fmt: skip


class _Memory:
    """What a descriptor asks a tensor for; it keeps none alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


@lru_cache(maxsize=8192)
def _descriptor(
    address: int, dtype: torch.dtype, rows: int, columns: int, box_rows: int, box_columns: int, layout: int
) -> Any:
    """Describe a matrix to TMA; to make one costs the host as much as a quarter of a launch.

    Args:
        address: Of the matrix, whose rows follow each other.
        dtype: Of its elements.
        rows: Of the matrix.
        columns: Of the matrix.
        box_rows: Of what is copied at a time.
        box_columns: Of what is copied at a time.
        layout: Number of one of `_layouts`.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        _Memory(address, dtype), [rows, columns], [columns, 1], [box_rows, box_columns], _layouts()[layout]
    )


@lru_cache
def _layouts() -> tuple[Any, Any, Any]:
    """Return how tiles of x, of words and of scales lie in shared memory: swizzled over a row, or not at all."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return tuple(NVMMASharedLayout(row_bytes, bits, 2) for row_bytes, bits in ((128, 16), (64, 32), (0, 16)))


@lru_cache(maxsize=4096)
def plan_for(rows: int, out_features: int, tiles: int, most_sharers: int, multiprocessors: int) -> Plan:
    """Return the plan that takes the least time. A multiprocessor holds one program at a time.

    Args:
        rows: M.
        out_features: N.
        tiles: B.
        most_sharers: Programs that there are flags for.
        multiprocessors: Of the device.
    """
    return min(
        (
            plan
            for block in STAGES
            for plan in plans(block, rows, out_features, tiles, most_sharers, multiprocessors)
        ),
        key=lambda plan: MODEL.time_us(plan, tiles),
    )


def plans(
    block: int, rows: int, out_features: int, tiles: int, most_sharers: int, multiprocessors: int
) -> Iterator[Plan]:
    """Yield every plan for blocks of so many rows; arguments as in `plan_for`."""
    parts = -(-rows // block) * -(-out_features // PART)
    rounds, shared = divmod(parts, multiprocessors)
    most = min(multiprocessors, most_sharers, shared * min(tiles, _MOST_SHARES))
    equal = {shared * shares for shares in range(1, _MOST_SHARES + 1)}
    for sharers in sorted(equal | {most}):
        if sharers == shared or shared < sharers <= most:
            yield Plan(block, rounds, shared, sharers, multiprocessors if rounds else sharers)
