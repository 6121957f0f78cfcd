"""Starting the Triton kernels: shapes of programs, masks and memory for every size of input.

Imports triton; `quantkit_runtime.kernels.ops` imports this module when an operator first runs.

Legend: M = rows, N = out_features, K = in_features, G = groups, E = experts, B = tiles along K.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from quantkit_runtime.kernels import convert
from quantkit_runtime.kernels import multiply as kernels
from quantkit_runtime.kernels.tiles import PART, TILE

_PROGRAMS_PER_MULTIPROCESSOR = 1.5
"""What splitting K aims at; measured best between 1.4 and 1.6 on Hopper."""
_MIN_TILES_PER_PROGRAM = 3
_MAX_SPLIT = 8
_MAX_BLOCK_ROWS = 64
_UNPACKED_AT_ONCE = 64
_MAX_E4M3 = 448.0


def multiply(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    group: int,
) -> Tensor:
    """Multiply few rows with packed weights, see `kernels.multiply.multiply_kernel`.

    Args:
        x: (M, K) contiguous, bf16 or fp16.
        tiles: (B, N, 16) int32.
        scales: (G, N) float16.
        zeros: (G, N) uint8; None in a symmetric scheme.
        bias: (N,) or None.
        counters: (ceil(N / 128),) int32, all 0; 0 again afterwards.
        group: Input features per group; 0 if a group is a whole row of the weight.

    Returns:
        (M, N) in the dtype of ``x``.
    """
    (rows, in_features), out_features = x.shape, tiles.shape[1]
    block = min(max(triton.next_power_of_2(rows), 8), _MAX_BLOCK_ROWS)
    blocks, parts = triton.cdiv(rows, block), triton.cdiv(out_features, PART)
    split = _split(parts, tiles.shape[0], x.device) if blocks == 1 else 1
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    partial = torch.empty(split * rows * out_features if split > 1 else 0, device=x.device)
    kernels.multiply_kernel[(blocks * parts, split)](
        x, tiles, scales, scales if zeros is None else zeros, scales if bias is None else bias, out, partial,
        counters, rows, out_features, in_features, GROUP=group, ASYM=zeros is not None, BIAS=bias is not None,
        EVEN_K=in_features % TILE == 0, BM=block, BN=PART, SPLIT=split, PTX=_takes_ptx(x), **_pipeline(block),
    )  # fmt: skip
    return out


def unpack(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, in_features: int, dtype: torch.dtype,
    divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the dense weight (N, K), over ``divisor`` (N,) float32 if there is one; other arguments as above."""
    out_features = tiles.shape[1]
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    convert.unpack_kernel[(triton.cdiv(out_features, _UNPACKED_AT_ONCE), tiles.shape[0])](
        tiles, scales, scales if zeros is None else zeros, scales if divisor is None else divisor, out,
        out_features, in_features, GROUP=group, ASYM=zeros is not None, DIVIDED=divisor is not None,
        EVEN_K=in_features % TILE == 0, BN=_UNPACKED_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (M, K) to e4m3; return it and the scale (M, 1) float32 of each."""
    rows, in_features = x.shape
    out = torch.empty(rows, in_features, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    convert.quantize_rows_kernel[(rows,)](
        x, out, scale, in_features, largest=_MAX_E4M3, BK=triton.next_power_of_2(in_features), num_warps=4
    )
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
    part = 32 if block_rows < 16 else 64
    kernels.multiply_experts_kernel[(expert.numel(), triton.cdiv(out_features, part))](
        x, tiles, scales, scales if zeros is None else zeros, order, expert, start,
        scales if weights is None else weights, out, top_k, experts, out_features, in_features, scales.shape[1],
        GROUP=group, ASYM=zeros is not None, GATED=gated, WEIGHTED=weights is not None, SORTED=sorted_,
        EVEN_K=in_features % TILE == 0, BM=block_rows, BN=part, PTX=_takes_ptx(x), **_pipeline(block_rows),
    )  # fmt: skip
    return out


def _split(parts: int, tiles: int, device: torch.device) -> int:
    """Return among how many programs to share K, so that few parts of N still fill the device."""
    wanted = round(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) / parts)
    return max(1, min(wanted, tiles // _MIN_TILES_PER_PROGRAM, _MAX_SPLIT))


def _pipeline(block_rows: int) -> dict[str, Any]:
    """Return warps, and stages of loads ahead of the multiplication."""
    return {"num_warps": 2, "STAGES": 5} if block_rows <= 16 else {"num_warps": 4, "STAGES": 3}


def _takes_ptx(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.cuda is not None


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64
