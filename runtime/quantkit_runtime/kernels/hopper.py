"""Gluon: products of many rows with 4-bit weights that are unpacked in registers, for NVIDIA's Hopper GPUs.

There the instruction that multiplies (wgmma) runs beside the ones that unpack, as long as a program keeps it fed,
which Triton does not arrange. So one warp does nothing but copy tiles to shared memory (by TMA, which needs no
registers and no masks), and two groups of four warps, each with half of the output features, unpack the next 16
input features while the tensor cores work on the last ones. The groups do not wait for each other, so that one has
work for the tensor cores while the other begins a tile.

Legend: M = rows, N = out_features, K = in_features, G = groups, B = tiles along K, E = experts; a program computes
BN output features of BM rows. The weights are the left operand, which may come from registers; of x the right one
may not. `quantkit_runtime.kernels.tiles` has the layout of the weights.
"""
# mypy: ignore-errors
# Gluon compiles functions from their source; annotations other than constexpr mean nothing in them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from quantkit_runtime.kernels.tiles import code_ptx

# The barrier of a program's threads was renamed between Triton 3.6 and 3.8.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Blocks of rows that follow each other for all output features, so that the L2 cache holds them.
_BAND = gl.constexpr(8)


def _unpacking(ones: int, one: int, kind: str) -> gl.constexpr:
    """Return, for each position of a nibble, PTX that makes a pair of weights out of two words.

    Args:
        ones: See `code_ptx`.
        one: Bits of 1.0; a multiplication by it makes the sum an instruction that bf16 has, too.
        kind: Of the pairs.
    """
    scale = f"mov.b32 o, {one * 0x10001:#010x}; fma.rn.{kind} t, t, o, $3; mul.rn.{kind} $0, t, $4;"
    return gl.constexpr(tuple(f"{{ .reg .b32 t, o; {code_ptx(j, ones)} {scale} }}" for j in range(8)))


_BF16 = _unpacking(0x4300, 0x3F80, "bf16x2")  # 128 + code
_FP16 = _unpacking(0x6400, 0x3C00, "f16x2")  # 1024 + code


@gluon.jit
def _weights(words, minus, scale, POSITION: gl.constexpr):
    """Weights (BN, 16) at one position of the words (BN, 16): exact codes less their zero, times the scale.

    ``minus`` (BN, 1) is what `_minus` returns.
    """
    if scale.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_BF16[POSITION], "=r,r,r,r,r", [words, minus, scale], gl.bfloat16, True, 2)
    else:  # noqa: RET505  (without it the compiler takes both)
        return gl.inline_asm_elementwise(_FP16[POSITION], "=r,r,r,r,r", [words, minus, scale], gl.float16, True, 2)


@gluon.jit
def _minus(zero_ptrs, ASYM: gl.constexpr, dtype: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """What to add to the float that a code was set into: minus its ones, minus the zero point. (BN, 1)."""
    ones: gl.constexpr = 128 if dtype == gl.bfloat16 else 1024
    if ASYM:
        return -(ones + gl.load(zero_ptrs).to(gl.float32)).to(dtype)[:, None]
    else:  # noqa: RET505  (as above)
        return gl.full([BN, 1], -(ones + 8), dtype, layout)


@gluon.jit
def _copy(
    x_desc, tiles_desc, scales_desc, xs, words, scales, full, free, first_m, first_n, tile, group, first, last, N,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: tiles from ``first`` to before ``last`` into the stages in turn, as they become free."""
    for b in range(first, last):
        stage = (b - first) % STAGES
        mbarrier.wait(free.index(stage), ((b - first) // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), xs.shape[1] * 256 + words.shape[1] * (64 + 2))
        tma.async_copy_global_to_shared(x_desc, [first_m, b * 128], full.index(stage), xs.index(stage))
        tma.async_copy_global_to_shared(
            tiles_desc, [(tile + b) * N + first_n, 0], full.index(stage), words.index(stage)
        )
        row = group + (b * 128 // GROUP if GROUP else 0)
        tma.async_copy_global_to_shared(scales_desc, [row, first_n], full.index(stage), scales.index(stage))


@gluon.jit
def _take(
    words_ring, scales_ring, stage, HALF: gl.constexpr, dtype: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr
):
    """Words (BN, 16) and scales (BN, 1) of a stage."""
    words = words_ring.index(stage).slice(HALF * BN, BN, 0).load(layout)
    return words, scales_ring.index(stage).slice(HALF * BN, BN, 1).permute((1, 0)).load(layout).to(dtype)


@gluon.jit
def _multiply(
    xs, words_ring, scales_ring, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, first_m,
    end_m, first_n, group, first, last, N, HALF: gl.constexpr, GROUP: gl.constexpr, ASYM: gl.constexpr,
    BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One group of multiplying warps, with BN = 64 of the program's output features."""
    dtype: gl.constexpr = xs.dtype
    first_n += HALF * BN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    zero_ptrs = zeros_ptr + group * N + (first_n + gl.arange(0, BN, gl.SliceLayout(1, left))) % N
    acc = gl.zeros([BN, BM], gl.float32, mma)
    if first < last:
        minus = _minus(zero_ptrs + (first * 128 // GROUP if GROUP else 0) * N, ASYM, dtype, BN, left)
        mbarrier.wait(full.index(0), 0)
        words, scale = _take(words_ring, scales_ring, 0, HALF, dtype, BN, left)
        weights = _weights(words, minus, scale, 0)
        for b in range(first, last):
            x = xs.index((b - first) % STAGES)
            following = (b - first + 1) % STAGES
            ahead = gl.minimum(b + 1, last - 1)
            acc = warpgroup_mma(weights, x.slice(0, 16, 1).permute((1, 0)), acc, is_async=True)
            next_minus = _minus(zero_ptrs + (ahead * 128 // GROUP if GROUP else 0) * N, ASYM, dtype, BN, left)
            for j in gl.static_range(1, 8):
                in_use = weights
                weights = _weights(words, minus, scale, j)
                if j == 4:
                    # In the middle of a tile, when the tensor cores have work left.
                    before = (b - first + STAGES - 1) % STAGES
                    mbarrier.arrive(free.index(before), count=1, pred=b > first)
                    mbarrier.wait(full.index(following), (b - first + 1) // STAGES & 1, pred=b + 1 < last)
                    next_words, next_scale = _take(words_ring, scales_ring, following, HALF, dtype, BN, left)
                acc = warpgroup_mma(weights, x.slice(16 * j, 16, 1).permute((1, 0)), acc, is_async=True)
                acc, _ = warpgroup_mma_wait(1, deps=[acc, in_use])
            in_use = weights
            words = next_words
            scale = next_scale
            minus = next_minus
            weights = _weights(words, minus, scale, 0)
            # What is in flight across the end of an iteration makes the assembler wait after every instruction.
            acc, _ = warpgroup_mma_wait(0, deps=[acc, in_use])
    if SPLIT > 1:
        # The last program to arrive adds up what all left, in a fixed order; the others store nothing.
        i = gl.arange(0, BN, gl.SliceLayout(1, mma))
        at = i[:, None] * BM + gl.arange(0, BM, gl.SliceLayout(0, mma))[None, :]
        part = gl.program_id(0) * 2 + HALF
        partial_ptr += part * (BN * BM)
        stride = gl.num_programs(0) * (2 * BN * BM)
        gl.store(partial_ptr + gl.program_id(1) * stride + at, acc)
        _barrier()
        arrived = gl.atomic_add(counter_ptr + part, 1, sem="acq_rel")
        end_m = gl.where(arrived == SPLIT - 1, end_m, 0)
        if arrived == SPLIT - 1:
            acc = gl.zeros([BN, BM], gl.float32, mma)
            for other in range(SPLIT):
                acc += gl.load(partial_ptr + other * stride + at, cache_modifier=".cg")
            gl.store(counter_ptr + part, 0)
    if BIAS:
        n = (first_n + gl.arange(0, BN, gl.SliceLayout(1, mma))) % N
        acc += gl.load(bias_ptr + n).to(gl.float32)[:, None]
    # Through shared memory, so that rows are stored in long runs: half a stage of x, which nobody reads any more.
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BN, BN // 8], [4, 1], [1, 0])
    out = xs.index(0).slice(HALF * BN, BN, 1)
    out.permute((1, 0)).store(acc.to(dtype))
    m = first_m + gl.arange(0, BM, gl.SliceLayout(1, store))
    n = first_n + gl.arange(0, BN, gl.SliceLayout(0, store))
    at = m.to(gl.int64)[:, None] * N + n[None, :]
    gl.store(out_ptr + at, out.load(store), mask=(m[:, None] < end_m) & (n[None, :] < N))


@gluon.jit(do_not_specialize=["M", "blocks"])
def multiply_kernel(
    x_desc, tiles_desc, scales_desc, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, expert_ptr, start_ptr,
    M, N, K, G, blocks, experts, GROUP: gl.constexpr, ASYM: gl.constexpr, BIAS: gl.constexpr,
    EXPERTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = x (M, K) @ W.T + bias; program (block of rows and part of N, share of K).

    The descriptors: x (M, K) in boxes (BM, 128); words (B N, 16) in boxes (BN, 16); scales (G, N) in boxes (1, BN).

    With SPLIT > 1 every group of warps leaves its part in ``partial``, (SPLIT, 2 programs, BN / 2, BM) float32, and
    the last one to arrive, by ``counter`` (2 programs,) int32, adds them up. It leaves the counter at 0, as it was.

    With EXPERTS the weights are those of E experts, one after the other, and the rows are sorted by expert:
    ``expert`` and ``start`` (blocks,) say whose rows a block holds and which is its first; after them ``start`` has
    where each expert's rows end. Blocks of an expert that is not there are left out.
    """
    parts = gl.cdiv(N, BN)
    band = gl.program_id(0) // (_BAND * parts)
    place = gl.program_id(0) % (_BAND * parts)
    width = gl.minimum(blocks - band * _BAND, _BAND)
    block = band * _BAND + place % width
    first_n = place // width * BN
    tiles = K // 128
    share = gl.cdiv(tiles, SPLIT)
    first = gl.program_id(1) * share
    last = gl.minimum(first + share, tiles)
    first_m = block * BM
    end_m = M
    expert = 0
    if EXPERTS:
        expert = gl.load(expert_ptr + block)
        first_m = gl.load(start_ptr + block)
        last = gl.where(expert < experts, last, first)
        expert = gl.minimum(expert, experts - 1)
        end_m = gl.where(last > first, gl.load(start_ptr + blocks + expert), 0)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 16], tiles_desc.layout)
    scales = gl.allocate_shared_memory(gl.float16, [STAGES, 1, BN], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=2)
    group = expert * G
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    xs, words, scales, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr,
                    first_m, end_m, first_n, group, first, last, N, 0, GROUP, ASYM, BIAS, BM, BN // 2, STAGES,
                    SPLIT,
                ),
            ),
            (
                _multiply,
                (
                    xs, words, scales, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr,
                    first_m, end_m, first_n, group, first, last, N, 1, GROUP, ASYM, BIAS, BM, BN // 2, STAGES,
                    SPLIT,
                ),
            ),
            (
                _copy,
                (
                    x_desc, tiles_desc, scales_desc, xs, words, scales, full, free, first_m, first_n,
                    expert * tiles, group, first, last, N, GROUP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
