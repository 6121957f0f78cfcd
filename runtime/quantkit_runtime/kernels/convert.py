"""Triton: 4-bit weights as dense matrices, activations as e4m3.

Legend: M = rows, N = out_features, K = in_features, G = groups; BN = output features that a program unpacks.
`quantkit_runtime.kernels.tiles` has the layout of the weights.
"""
# mypy: ignore-errors
# Triton compiles functions from their source; annotations other than constexpr mean nothing in them.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_kernel(
    tiles_ptr, scales_ptr, zeros_ptr, divisor_ptr, out_ptr, N, K, GROUP: tl.constexpr, ASYM: tl.constexpr,
    DIVIDED: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Out (N, K) = scale * (code - zero), over a divisor (N,) per row if DIVIDED; program (part of N, tile of K).

    Computed in float32, where it is exact, and rounded once. GROUP is 0 if a group is a whole row of the weight.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    i = tl.arange(0, 16)
    j = tl.arange(0, 8)
    n_mask = n < N
    words = tl.load(tiles_ptr + (b * N + n[:, None]) * 16 + i[None, :], mask=n_mask[:, None], other=0)
    codes = (words[:, None, :] >> (4 * j)[None, :, None]) & 0xF
    # 2 ** 23 + code without a conversion, which costs a GPU four times as much as the addition that takes it off
    value = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    # A group may change from one slice of 16 features to the next.
    start = b * 128 + 16 * j
    group = start // GROUP if GROUP else start * 0
    mask = n_mask[:, None] & (start[None, :] < K)
    at = group[None, :] * N + n[:, None]
    scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DIVIDED:
        scale = scale / tl.load(divisor_ptr + n, mask=n_mask, other=1.0)[:, None]
    if ASYM:
        zero = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
        value = (value - 8388608.0) - zero[:, :, None]
    else:
        value = value - 8388616.0
    weight = tl.reshape((value * scale[:, :, None]).to(out_ptr.dtype.element_ty), (BN, 128))
    k = b * 128 + tl.arange(0, 128)
    inside = n_mask[:, None]
    if not EVEN_K:
        inside = inside & (k[None, :] < K)
    tl.store(out_ptr + n[:, None].to(tl.int64) * K + k[None, :], weight, mask=inside)


@triton.jit
def quantize_rows_kernel(x_ptr, out_ptr, scale_ptr, K, largest: tl.constexpr, BK: tl.constexpr):
    """Rows of x (M, K) as e4m3 (M, K), each divided by its own scale (M,) float32; program (row)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    tl.store(scale_ptr + row, peak / largest)
    tl.store(out_ptr + row * K + k, (x * (largest / peak)).to(out_ptr.dtype.element_ty), mask=k < K)
