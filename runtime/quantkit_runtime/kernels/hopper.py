"""Gluon: products of many rows with 4-bit weights that are unpacked in registers, for NVIDIA's Hopper GPUs.

There the instruction that multiplies (wgmma) runs beside the ones that unpack, as long as a program keeps it fed,
which Triton does not arrange. So one warp does nothing but copy tiles to shared memory (by TMA, which needs no
registers and no masks), and two groups of four warps, each with half of the output features, unpack the next 16
input features while the tensor cores work on the last ones. The groups wait for each other only at the end of a
part, so that one has work for the tensor cores while the other begins a tile. A program stays on its multiprocessor
and works on parts of the result one after the other.

Legend: M = rows, N = out_features, K = in_features, G = groups, B = tiles along K, E = experts; a part of the
result has BN output features of BM rows. The weights are the left operand, which may come from registers; of x the
right one may not. `quantkit_runtime.kernels.tiles` has the layout of the weights.
"""
# mypy: ignore-errors
# Gluon compiles functions from their source; annotations other than constexpr mean nothing in them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
def _place(number, parts, blocks, BN: gl.constexpr):
    """Block of rows and first output feature of a part of the result: bands of blocks, one after the other."""
    band = number // (_BAND * parts)
    place = number % (_BAND * parts)
    width = gl.maximum(gl.minimum(blocks - band * _BAND, _BAND), 1)  # of an empty segment it could be 0
    return band * _BAND + place % width, place // width * BN


@gluon.jit
def _segment(step, rounds, shared, tiles, sharers):
    """Part of the result that this program works on, and from which tile to before which.

    ``rounds`` parts are its own. Of the ``shared`` parts that are left each of the ``sharers`` has as many tiles as
    the others, which begin and end anywhere: the rest of one part, and the beginning of the next. Either may be
    empty.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    begin = program * (shared * tiles) // sharers
    end = (program + 1) * (shared * tiles) // sharers
    part = begin // tiles + step - rounds
    first = gl.maximum(begin - part * tiles, 0)
    last = gl.where(program < sharers, gl.minimum(end - part * tiles, tiles), first)
    whole = step < rounds
    number = gl.where(whole, step * programs + program, rounds * programs + part)
    return number, gl.where(whole, 0, first), gl.where(whole, tiles, gl.maximum(last, first))


@gluon.jit
def _rows(expert_ptr, start_ptr, block, blocks, M, experts, EXPERTS: gl.constexpr, BM: gl.constexpr):
    """Expert, first row, and row before which to end of a block; the last is 0 for a block that is nobody's."""
    expert = 0
    first_m = block * BM
    end_m = M
    if EXPERTS:
        expert = gl.load(expert_ptr + block)
        first_m = gl.load(start_ptr + block)
        there = expert < experts
        expert = gl.minimum(expert, experts - 1)
        end_m = gl.where(there, gl.load(start_ptr + blocks + expert), 0)
    return expert, first_m, end_m


@gluon.jit
def _copy(
    x_desc, tiles_desc, scales_desc, xs, words, scales, full, free, expert_ptr, start_ptr, M, N, G, tiles, blocks,
    parts, experts, rounds, shared, sharers, GROUP: gl.constexpr, EXPERTS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: tiles of all segments into the stages in turn, as they become free."""
    copied = 0
    for step in range(rounds + gl.where(shared > 0, 2, 0)):
        number, first, last = _segment(step, rounds, shared, tiles, sharers)
        block, first_n = _place(number, parts, blocks, BN)
        expert, first_m, end_m = _rows(expert_ptr, start_ptr, block, blocks, M, experts, EXPERTS, BM)
        last = gl.where(end_m > 0, last, first)
        for b in range(first, last):
            at = copied + b - first
            stage = at % STAGES
            mbarrier.wait(free.index(stage), (at // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), xs.shape[1] * 256 + words.shape[1] * (64 + 2))
            tma.async_copy_global_to_shared(x_desc, [first_m, b * 128], full.index(stage), xs.index(stage))
            row = (expert * tiles + b) * N + first_n
            tma.async_copy_global_to_shared(tiles_desc, [row, 0], full.index(stage), words.index(stage))
            row = expert * G + (b * 128 // GROUP if GROUP else 0)
            tma.async_copy_global_to_shared(scales_desc, [row, first_n], full.index(stage), scales.index(stage))
        copied += last - first


@gluon.jit
def _take(
    words_ring, scales_ring, stage, HALF: gl.constexpr, dtype: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr
):
    """Words (BN, 16) and scales (BN, 1) of a stage."""
    words = words_ring.index(stage).slice(HALF * BN, BN, 0).load(layout)
    return words, scales_ring.index(stage).slice(HALF * BN, BN, 1).permute((1, 0)).load(layout).to(dtype)


@gluon.jit
def _multiply(
    xs, words_ring, scales_ring, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, flag_ptr, expert_ptr,
    start_ptr, M, N, G, tiles, blocks, parts, experts, rounds, shared, sharers, HALF: gl.constexpr,
    GROUP: gl.constexpr, ASYM: gl.constexpr, BIAS: gl.constexpr, EXPERTS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of multiplying warps, with BN = 64 of a part's output features."""
    dtype: gl.constexpr = xs.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BN, BN // 8], [4, 1], [1, 0])
    program = gl.program_id(0)
    taken = 0
    stored = 0
    for step in range(rounds + gl.where(shared > 0, 2, 0)):
        number, first, last = _segment(step, rounds, shared, tiles, sharers)
        block, first_n = _place(number, parts, blocks, 2 * BN)
        expert, first_m, end_m = _rows(expert_ptr, start_ptr, block, blocks, M, experts, EXPERTS, BM)
        last = gl.where(end_m > 0, last, first)
        first_n += HALF * BN
        if first < last:
            acc = gl.zeros([BN, BM], gl.float32, mma)
            zero_ptrs = zeros_ptr + expert * G * N + (first_n + gl.arange(0, BN, gl.SliceLayout(1, left))) % N
            minus = _minus(zero_ptrs + (first * 128 // GROUP if GROUP else 0) * N, ASYM, dtype, BN, left)
            mbarrier.wait(full.index(taken % STAGES), taken // STAGES & 1)
            words, scale = _take(words_ring, scales_ring, taken % STAGES, HALF, dtype, BN, left)
            weights = _weights(words, minus, scale, 0)
            for b in range(first, last):
                at = taken + b - first
                x = xs.index(at % STAGES)
                following = (at + 1) % STAGES
                ahead = gl.minimum(b + 1, last - 1)
                acc = warpgroup_mma(weights, x.slice(0, 16, 1).permute((1, 0)), acc, is_async=True)
                next_minus = _minus(zero_ptrs + (ahead * 128 // GROUP if GROUP else 0) * N, ASYM, dtype, BN, left)
                for j in gl.static_range(1, 8):
                    in_use = weights
                    weights = _weights(words, minus, scale, j)
                    if j == 4:
                        # In the middle of a tile, when the tensor cores have work left.
                        mbarrier.arrive(free.index((at + STAGES - 1) % STAGES), count=1, pred=b > first)
                        mbarrier.wait(full.index(following), (at + 1) // STAGES & 1, pred=b + 1 < last)
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
            held = (taken + last - first - 1) % STAGES
            # Squares of 8 x 8 one after the other, which is how the threads hold them.
            i = gl.arange(0, BN, gl.SliceLayout(1, mma))[:, None]
            j = gl.arange(0, BM, gl.SliceLayout(0, mma))[None, :]
            square = (j // 8 * (BN // 8) + i // 8) * 64 + i % 8 * 8 + j % 8
            if first > 0:
                # Another program began this part; it adds up what the others leave.
                gl.store(partial_ptr + (program * 2 + HALF) * (BN * BM) + square, acc)
                _barrier()
                gl.atomic_add(flag_ptr + program * 2 + HALF, 1, sem="release")
            else:
                if last < tiles:
                    end = (number - rounds * gl.num_programs(0) + 1) * tiles
                    # Those who begin before the end of this part.
                    for other in range(program + 1, gl.cdiv(end * sharers, shared * tiles)):
                        flag = flag_ptr + other * 2 + HALF
                        left_it = gl.atomic_add(flag, 0, sem="acquire")
                        while left_it == 0:
                            left_it = gl.atomic_add(flag, 0, sem="acquire")
                        acc += gl.load(partial_ptr + (other * 2 + HALF) * (BN * BM) + square, cache_modifier=".cg")
                        gl.store(flag, 0)
                if BIAS:
                    n = (first_n + gl.arange(0, BN, gl.SliceLayout(1, mma))) % N
                    acc += gl.load(bias_ptr + n).to(gl.float32)[:, None]
                # Through shared memory, so that rows are stored in long runs: half of the last stage of x, which is
                # kept for that until here, and which both groups have read when both are here.
                mbarrier.arrive(done, count=1)
                mbarrier.wait(done, stored & 1)
                out = xs.index(held).slice(HALF * BN, BN, 1)
                out.permute((1, 0)).store(acc.to(dtype))
                m = first_m + gl.arange(0, BM, gl.SliceLayout(1, store))
                n = first_n + gl.arange(0, BN, gl.SliceLayout(0, store))
                target = m.to(gl.int64)[:, None] * N + n[None, :]
                gl.store(out_ptr + target, out.load(store), mask=(m[:, None] < end_m) & (n[None, :] < N))
                fence_async_shared()
            _barrier()
            mbarrier.arrive(free.index(held), count=1)
            stored += gl.where(first > 0, 0, 1)
        taken += last - first


@gluon.jit(do_not_specialize=["M", "blocks", "rounds", "shared", "sharers"])
def multiply_kernel(
    x_desc, tiles_desc, scales_desc, zeros_ptr, bias_ptr, out_ptr, partial_ptr, flag_ptr, expert_ptr, start_ptr,
    N, K, G, experts, M, blocks, rounds, shared, sharers, GROUP: gl.constexpr, ASYM: gl.constexpr,
    BIAS: gl.constexpr, EXPERTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = x (M, K) @ W.T + bias, of which a part has BM rows and BN output features.

    The descriptors: x (M, K) in boxes (BM, 128); words (B N, 16) in boxes (BN, 16); scales (G, N) in boxes (1, BN).

    Every program has ``rounds`` parts of its own, and the first ``sharers`` programs an equal share of the tiles of
    the ``shared`` parts that are left over, at most a whole part's. A program that begins amidst a part leaves its
    sum in ``partial`` (sharers, 2, BN / 2, BM) float32 and says so in ``flag`` (sharers, 2) int32; the one that
    began it waits for that, adds up in a fixed order, and leaves 0 in the flags, as they were. Nobody waits before
    it has left what others wait for. Whom a program waits for has one of the next numbers; as GPUs start
    programs in order, work goes on wherever two or more run at a time.

    With EXPERTS the weights are those of E experts, one after the other, and the rows are sorted by expert:
    ``expert`` and ``start`` (blocks,) say whose rows a block holds and which is its first; after them ``start`` has
    where each expert's rows end. Blocks of an expert that is not there are left out.
    """
    parts = gl.cdiv(N, BN)
    tiles = K // 128
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
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    xs, words, scales, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, flag_ptr,
                    expert_ptr, start_ptr, M, N, G, tiles, blocks, parts, experts, rounds, shared, sharers, 0,
                    GROUP, ASYM, BIAS, EXPERTS, BM, BN // 2, STAGES,
                ),
            ),
            (
                _multiply,
                (
                    xs, words, scales, full, free, done, zeros_ptr, bias_ptr, out_ptr, partial_ptr, flag_ptr,
                    expert_ptr, start_ptr, M, N, G, tiles, blocks, parts, experts, rounds, shared, sharers, 1,
                    GROUP, ASYM, BIAS, EXPERTS, BM, BN // 2, STAGES,
                ),
            ),
            (
                _copy,
                (
                    x_desc, tiles_desc, scales_desc, xs, words, scales, full, free, expert_ptr, start_ptr, M, N, G,
                    tiles, blocks, parts, experts, rounds, shared, sharers, GROUP, EXPERTS, BM, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
