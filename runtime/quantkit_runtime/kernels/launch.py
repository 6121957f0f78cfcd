"""Starting the Triton kernels: shapes of programs, masks and memory for every size of input.

Imports triton; `quantkit_runtime.kernels.ops` imports this module when an operator first runs.

Legend: M = rows, N = out_features, K = in_features, G = groups, E = experts, B = tiles along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from quantkit_runtime.kernels import convert, hopper_launch
from quantkit_runtime.kernels import multiply as kernels
from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.kernels.start import run_kernel
from quantkit_runtime.kernels.tiles import PART, TILE

_UNPACKED_AT_ONCE = 64
_MAX_E4M3 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class _Shape:
    """How a kernel works on a block of so many rows.

    Attributes:
        warps: Of a program.
        stages: Of loads, the one in use included.
        programs_per_multiprocessor: What sharing K among programs aims at.
        least_tiles: Of a share of K.
        most_shares: Of K at most; the parts of many rows cost more to add up than they save.
    """

    warps: int
    stages: int
    programs_per_multiprocessor: float
    least_tiles: int = 3
    most_shares: int = 8


# Up to 16 rows what was fastest, or at most 13 % slower, on an H200 for layers of 2048 x 4096 to 5120 x 13824; for
# more rows what was on an H100 for 3072 x 3072.
_SHAPES = {
    8: _Shape(2, 3, 3.6, least_tiles=2, most_shares=16),
    16: _Shape(2, 3, 2.0, least_tiles=4),
    32: _Shape(4, 3, 2.9),
    64: _Shape(4, 3, 1.2, most_shares=4),
    128: _Shape(8, 3, 0.75, most_shares=4),
}
MAX_BLOCK_ROWS = max(_SHAPES)


def multiply(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    group: int,
) -> Tensor:
    """Multiply with packed weights, see `kernels.multiply.multiply_kernel`, and `kernels.hopper` for many rows.

    Args:
        x: (M, K) contiguous, bf16 or fp16.
        tiles: (B, N, 16) int32.
        scales: (G, N) float16.
        zeros: (G, N) uint8; None in a symmetric scheme.
        bias: (N,) or None.
        counters: int32, all 0, and 0 again afterwards; K is shared among programs only where there is one for each
            part of the result, and on Hopper two for each program.
        group: Input features per group; 0 if a group is a whole row of the weight.

    Returns:
        (M, N) in the dtype of ``x``.
    """
    (rows, in_features), out_features = x.shape, tiles.shape[1]
    if (
        rows >= hopper_launch.MIN_ROWS
        and hopper_launch.runs_on(x.device)
        and hopper_launch.fits(in_features, out_features, group)
    ):
        return hopper_launch.multiply(x, tiles, scales, zeros, bias, counters, group)
    block, split = _plan(rows, out_features, tiles.shape[0], counters.numel(), multiprocessors(x.device))
    shape, early = _SHAPES[block], _starts_early(x.device)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    partial = torch.empty(split * rows * out_features if split > 1 else 0, dtype=torch.float32, device=x.device)
    run_kernel(
        kernels.multiply_kernel,
        (-(-rows // block) * -(-out_features // PART), split),
        (
            x, tiles, scales, scales if zeros is None else zeros, scales if bias is None else bias, out, partial,
            counters,
        ),
        (out_features, in_features),
        (rows,),
        {
            "GROUP": group, "ASYM": zeros is not None, "BIAS": bias is not None,
            "EVEN_N": out_features % PART == 0, "EVEN_K": in_features % TILE == 0, "BM": block, "BN": PART,
            "SPLIT": split, "STAGES": shape.stages, "PTX": _takes_ptx(x), "EARLY": early,
        },
        warps=shape.warps, early=early,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _plan(rows: int, out_features: int, tiles: int, counters: int, multiprocessors: int) -> tuple[int, int]:
    """Return the rows of a block and the shares of K."""
    block = min(max(triton.next_power_of_2(rows), 8), MAX_BLOCK_ROWS)
    shape = _SHAPES[block]
    programs = -(-rows // block) * -(-out_features // PART)
    if programs > counters:
        return block, 1
    wanted = shape.programs_per_multiprocessor * multiprocessors / programs
    most = min(int(wanted), tiles // shape.least_tiles, shape.most_shares)
    return block, 1 << (max(most, 1).bit_length() - 1)  # other numbers than powers of two are often far slower


def unpack(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, in_features: int, dtype: torch.dtype,
    divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the dense weight (N, K), over ``divisor`` (N,) float32 if there is one; other arguments as above."""
    out_features = tiles.shape[1]
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    run_kernel(
        convert.unpack_kernel,
        (-(-out_features // _UNPACKED_AT_ONCE), tiles.shape[0]),
        (
            tiles, scales, scales if zeros is None else zeros, scales if divisor is None else divisor, out,
        ),
        (out_features, in_features),
        (),
        {
            "GROUP": group, "ASYM": zeros is not None, "DIVIDED": divisor is not None,
            "EVEN_K": in_features % TILE == 0, "BN": _UNPACKED_AT_ONCE,
        },
        warps=4,
    )  # fmt: skip
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (M, K) to e4m3; return it and the scale (M, 1) float32 of each."""
    rows, in_features = x.shape
    out = torch.empty(rows, in_features, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(in_features)
    run_kernel(
        convert.quantize_rows_kernel, (rows, 1), (x, out, scale), (in_features,), (),
        {"largest": _MAX_E4M3, "BK": width}, warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out, scale


def multiply_experts(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, top_k: int,
    order: Tensor, expert: Tensor, start: Tensor, weights: Tensor | None, block_rows: int, *, gated: bool,
) -> Tensor:  # fmt: skip
    """Multiply every slot with its expert's weights, see `kernels.multiply.multiply_experts_kernel`.

    A slot is one of the experts that a token is sent to.

    Args:
        x: (tokens, K) if ``gated``, else (slots, K).
        tiles: (E, B, N, 16) int32; gate and up side by side if ``gated``.
        scales: (E, G, N) float16.
        zeros: (E, G, N) uint8; None in a symmetric scheme.
        group: As in `multiply`.
        top_k: Slots per token.
        order: (slots,) int32, slots sorted by expert; empty if every slot is a block.
        expert: (blocks,) int32, whose a block is; at least E for one that is nobody's.
        start: (blocks + E,) int32, where in ``order`` a block begins, and each expert's slots end.
        weights: (slots,), multiplied into the result; None means none.
        block_rows: Slots of a block at most.
        gated: Whether to return silu(gate) * up.

    Returns:
        (slots, N), half as wide if ``gated``; slots that no block holds are 0.
    """
    experts, _, width, _ = tiles.shape
    in_features = x.shape[1]
    out_features = width // 2 if gated else width
    slots = x.shape[0] * top_k if gated else x.shape[0]
    sorted_ = order.numel() > 0
    make = torch.zeros if sorted_ else torch.empty
    out = make(slots, out_features, dtype=x.dtype, device=x.device)
    part, warps = _part_of_experts(expert.numel(), block_rows, out_features, multiprocessors(x.device))
    run_kernel(
        kernels.multiply_experts_kernel,
        (expert.numel(), -(-out_features // part)),
        (
            x, tiles, scales, scales if zeros is None else zeros, order, expert, start,
            scales if weights is None else weights, out,
        ),
        (experts, out_features, in_features, scales.shape[1]),
        (top_k,),
        {
            "GROUP": group, "ASYM": zeros is not None, "GATED": gated, "WEIGHTED": weights is not None,
            "SORTED": sorted_, "EVEN_N": out_features % part == 0, "EVEN_K": in_features % TILE == 0,
            "BM": block_rows, "BN": part, "STAGES": _SHAPES[block_rows].stages, "PTX": _takes_ptx(x),
        },
        warps=warps,
    )  # fmt: skip
    return out


def _part_of_experts(blocks: int, block_rows: int, out_features: int, multiprocessors: int) -> tuple[int, int]:
    """Return the output features that a program computes for a block of slots, and its warps.

    What was fastest up to 16 rows on an H200, for 128 experts of 2048 and 768 features and 1 to 256 tokens.
    """
    if block_rows > 16:
        return 64, 4
    part = PART
    while part > 32 and blocks * -(-out_features // part) < multiprocessors:
        part //= 2
    return part, 1 if part == 32 else 2


@lru_cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one before it has ended; NVIDIA's can from Hopper on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _takes_ptx(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.cuda is not None
