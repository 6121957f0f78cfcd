"""Triton: products with 4-bit weights that are unpacked in the registers of the multiplication.

Legend: M = rows, N = out_features, K = in_features, G = groups; BN, BM = the part of the result that a program
computes. The weights are the left operand of the tensor cores' instruction, so that few rows pad its short side (8)
instead of its long one (16 or 64). `quantkit_runtime.kernels.tiles` has the layout of the weights.
"""
# mypy: ignore-errors
# Triton compiles functions from their source; annotations other than constexpr mean nothing in them.

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_runtime.kernels.tiles import code_ptx


def _unpacking(ones: int, minus: int, one: int, kind: str) -> tl.constexpr:
    """Return, for each position of a nibble, PTX that unpacks it out of two words into a pair of 16-bit floats.

    Args:
        ones: See `code_ptx`.
        minus: Bits of what to add then.
        one: Bits of 1.0; a multiplication by it makes the sum an instruction that every tensor core GPU has.
        kind: Of the pairs.
    """
    shift = f"mov.b32 c, {minus * 0x10001:#010x}; mov.b32 o, {one * 0x10001:#010x}; fma.rn.{kind} $0, t, o, c;"
    return tl.constexpr(tuple(f"{{ .reg .b32 t, c, o; {code_ptx(j, ones)} {shift} }}" for j in range(8)))


# bf16: 128 + code, then -136 or -128. fp16: 1024 + code, then -1032 or -1024. The midpoint of symmetric codes is 8.
_BF16_SYM = _unpacking(0x4300, 0xC308, 0x3F80, "bf16x2")
_BF16_ASYM = _unpacking(0x4300, 0xC300, 0x3F80, "bf16x2")
_FP16_SYM = _unpacking(0x6400, 0xE408, 0x3C00, "f16x2")
_FP16_ASYM = _unpacking(0x6400, 0xE400, 0x3C00, "f16x2")


@triton.jit
def _slice(words, POSITION: tl.constexpr, dtype: tl.constexpr, ASYM: tl.constexpr, PTX: tl.constexpr):
    """Codes (BN, 16) at one position of the words (BN, 16), less the midpoint 8 where they are symmetric.

    Without a conversion from integer to float, of which a GPU does a quarter or less than of other instructions.
    """
    if dtype == tl.bfloat16:
        if PTX:
            return tl.inline_asm_elementwise(
                _BF16_ASYM[POSITION] if ASYM else _BF16_SYM[POSITION], "=r,r,r", [words], tl.bfloat16, True, 2
            )
        else:  # noqa: RET505  (without it Triton compiles both)
            code = ((words >> (4 * POSITION)) & 0xF).to(tl.int16) | 0x4300
            return code.to(tl.bfloat16, bitcast=True) - (128 if ASYM else 136)
    else:
        if PTX:
            return tl.inline_asm_elementwise(
                _FP16_ASYM[POSITION] if ASYM else _FP16_SYM[POSITION], "=r,r,r", [words], tl.float16, True, 2
            )
        else:  # noqa: RET505  (as above)
            code = ((words >> (4 * POSITION)) & 0xF).to(tl.int16) | 0x6400
            return code.to(tl.float16, bitcast=True) - (1024 if ASYM else 1032)


@triton.jit
def _accumulate(
    x_ptrs, tiles_ptr, scales_ptr, zeros_ptr, n, N, K, first, last,
    GROUP: tl.constexpr, ASYM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Part (BN, BM), float32, of W @ x.T over the tiles from ``first`` to before ``last``.

    ``x_ptrs`` (BM,) points to the first feature of each row, all of which there must be. GROUP is 0 if a group is a
    whole row of the weight. EVEN_N and EVEN_K: BN divides N, a tile K; masks are spared then.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    scaled: tl.constexpr = GROUP if GROUP and GROUP < 128 else 128  # features after which a scale is applied
    i = tl.arange(0, 16)
    n_mask = tl.full((BN,), True, tl.int1) if EVEN_N else n < N
    acc = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(first, last, num_stages=STAGES):
        words = tl.load(tiles_ptr + (b * N + n[:, None]) * 16 + i[None, :], mask=n_mask[:, None], other=0)
        part = tl.zeros((BN, BM), tl.float32)
        for j in tl.static_range(8):
            k = b * 128 + 16 * j + i
            start = b * 128 + 16 * j // scaled * scaled  # of the group
            present = n_mask
            if EVEN_K:
                x = tl.load(x_ptrs[None, :] + k[:, None])
            else:
                present = present & (start < K)
                x = tl.load(x_ptrs[None, :] + k[:, None], mask=k[:, None] < K, other=0.0)
            weights = _slice(words, j, dtype, ASYM, PTX)
            if ASYM:
                row = (start // GROUP if GROUP else 0) * N
                zeros = tl.load(zeros_ptr + row + n, mask=present, other=0)
                weights = weights - zeros.to(dtype)[:, None]
            part = tl.dot(weights, x, part)
            if (16 * (j + 1)) % scaled == 0:
                row = (start // GROUP if GROUP else 0) * N
                scales = tl.load(scales_ptr + row + n, mask=present, other=0.0)
                acc += part * scales[:, None].to(tl.float32)
                part = tl.zeros((BN, BM), tl.float32)
    return acc


@triton.jit(do_not_specialize=["M"])
def multiply_kernel(
    x_ptr, tiles_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, N, K, M,
    GROUP: tl.constexpr, ASYM: tl.constexpr, BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = x (M, K) @ W.T + bias; program (part of M and N, part of K).

    EARLY: it was launched before the kernel before it has ended, for which it waits; what follows may do the same.

    With SPLIT > 1 every program leaves its part in ``partial`` (SPLIT, M, N) float32, and the last one to arrive,
    by ``counter`` (parts,) int32, adds them up in a fixed order. It leaves the counter at 0, as it was.
    """
    parts_m = tl.cdiv(M, BM)
    part = tl.program_id(0)
    split = tl.program_id(1)
    m = (part % parts_m) * BM + tl.arange(0, BM)
    n = (part // parts_m) * BN + tl.arange(0, BN)
    tiles = tl.cdiv(K, 128)
    share = tl.cdiv(tiles, SPLIT)
    first = split * share
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Rows beyond the last are copies of the first ones, and not stored: cheaper than masks.
    acc = _accumulate(
        x_ptr + m % M * K, tiles_ptr, scales_ptr, zeros_ptr, n, N, K, first,
        tl.minimum(first + share, tiles), GROUP, ASYM, EVEN_N, EVEN_K, BM, BN, STAGES, PTX,
    )  # fmt: skip
    at = m[None, :] * N + n[:, None]
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT > 1:
        tl.store(partial_ptr + split * M * N + at, acc, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + part, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for other in tl.static_range(SPLIT):
                acc += tl.load(partial_ptr + other * M * N + at, mask=mask, other=0.0, cache_modifier=".cg")
            if BIAS:
                acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(counter_ptr + part, 0)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["top_k"])
def multiply_experts_kernel(
    x_ptr, tiles_ptr, scales_ptr, zeros_ptr, order_ptr, expert_ptr, start_ptr, weight_ptr, out_ptr,
    experts, N, K, G, top_k, GROUP: tl.constexpr, ASYM: tl.constexpr, GATED: tl.constexpr,
    WEIGHTED: tl.constexpr, SORTED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One expert's product for up to BM slots, a slot being one of the experts that a token is sent to.

    Program (block of slots, part of the output features). Unsorted, block p is slot p alone and ``expert`` (slots,)
    its expert. Sorted, ``order`` (slots,) lists the slots by expert; ``expert`` and ``start`` (blocks,) say whose
    slots a block holds and where in that list it begins, and after them ``start`` has where each expert's end.

    GATED: x is (tokens, K), the result silu(first N features) * (the N after them), of 2 N. Otherwise x is
    (slots, K), and WEIGHTED multiplies by ``weight`` (slots,). The result is (slots, N).
    """
    block = tl.program_id(0)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    row = tl.arange(0, BM)
    if SORTED:
        if expert >= experts:  # a block that no expert needed, or slots that are sent nowhere
            return
        place = tl.load(start_ptr + block) + row
        mask = place < tl.load(start_ptr + tl.num_programs(0) + expert)
        slot = tl.load(order_ptr + place, mask=mask, other=0)  # rows beyond the last are copies, and not stored
    else:
        slot = block + row * 0
        mask = row < 1
    slot = slot.to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = slot[None, :] * N + n[:, None]
    inside = mask[None, :] & (n[:, None] < N)
    if not SORTED:  # noqa: SIM102  (a condition of the compiler's, then one of the kernel's)
        if expert >= experts:
            tl.store(out_ptr + at, tl.zeros((BN, BM), out_ptr.dtype.element_ty), mask=inside)
            return
    tiles = tl.cdiv(K, 128)
    width = 2 * N if GATED else N
    x_ptrs = x_ptr + (slot // top_k if GATED else slot) * K
    tiles_ptr += expert * tiles * width * 16
    scales_ptr += expert * G * width
    zeros_ptr += expert * G * width
    acc = _accumulate(
        x_ptrs, tiles_ptr, scales_ptr, zeros_ptr, n, width, K, 0, tiles, GROUP, ASYM, EVEN_N, EVEN_K, BM, BN,
        STAGES, PTX,
    )  # fmt: skip
    if GATED:
        up = _accumulate(
            x_ptrs, tiles_ptr, scales_ptr, zeros_ptr, n + N, width, K, 0, tiles, GROUP, ASYM, EVEN_N, EVEN_K, BM,
            BN, STAGES, PTX,
        )  # fmt: skip
        acc = acc / (1 + tl.exp(-acc)) * up
    if WEIGHTED:
        acc *= tl.load(weight_ptr + slot, mask=mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
