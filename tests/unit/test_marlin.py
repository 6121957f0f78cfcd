"""Weights packed for Marlin, against what each lane of a warp makes of them, and the way to its host function.

What a lane holds is written down from PTX's figures for mma.m16n8k16, number by number, and how it gets there from
the loads and masks of Marlin's kernel. Nothing is shared with the packing.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import marlin
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack

K, N = 256, 512
LANES, TILES, OPERANDS = range(32), range(4), range(2)
# Only the order of arguments is Marlin's. Nothing is launched, and without a driver the runtime has errors anyway.
PEER = """
#include <cuda_runtime.h>
#define cudaGetLastError() cudaSuccess

const int ERR_PROB_SHAPE = 1;

int marlin_cuda(const void* A, const void* B, void* C, void* s, int prob_m, int prob_n, int prob_k, void* workspace,
                int groupsize = -1, int dev = 0, cudaStream_t stream = 0, int thread_k = -1, int thread_n = -1,
                int sms = -1, int max_par = 16) {
  if (groupsize == -1) return prob_m;
  long long told[] = {(long long) A, (long long) B, (long long) s, (long long) workspace, prob_m, prob_n, prob_k,
                      groupsize, dev, (long long) stream, thread_k, thread_n, sms, max_par};
  for (int index = 0; index < 14; index++) ((long long*) C)[index] = told[index];
  return 0;
}
"""


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scales = torch.randn(K // 128, N, generator=generator).to(torch.float16)
    return codes, scales


def operand_of(word):
    """The four fp16 numbers that Marlin makes of the low bytes of both halves of a word: code - 8."""
    low, high = (np.uint32(word & mask | 0x64006400) for mask in (0x000F000F, 0x00F000F0))
    ones, sixteens = np.array([low]).view(np.float16), np.array([high]).view(np.float16)
    return [*(ones - np.float16(1032)), *(sixteens * np.float16(1 / 16) - np.float16(72))]


def b_element(lane, index):
    """Row and column of the B operand (16 x 8) that a lane holds as its number ``index``."""
    return lane % 4 * 2 + index % 2 + (8 if index >= 2 else 0), lane // 4


def c_column(lane, index):
    """Column of the results (16 x 8) that a lane holds as its number ``index``."""
    return lane % 4 * 2 + index % 2


def test_the_lanes_of_every_warp_hold_the_weight(layer):
    codes, scales = layer
    packed = marlin.MarlinWeight.of(codes, scales)
    assert packed.out_features == N
    words = packed.codes.numpy().view(np.uint32).reshape(K // 16, N // 64, 32, 4)  # a load of 16 bytes of each lane
    loads = packed.scales.numpy().reshape(K // 128, N // 64, 8, 8)  # 8 loads of 16 bytes, one for four lanes
    weight = np.full((N, K), np.nan, dtype=np.float16)
    for step, block, lane, tile in np.ndindex(words.shape):
        word = int(words[step, block, lane, tile])
        for operand in OPERANDS:
            scale = loads[step // 8, block, lane // 4, 2 * tile + operand]
            for index, number in enumerate(operand_of(word >> 8 * operand)):
                row, column = b_element(lane, index)
                place = 64 * block + 16 * tile + 8 * operand + column, 16 * step + row
                assert np.isnan(weight[place])
                weight[place] = number * scale
    scheme = Scheme(group_size=128)
    expected = dequantize(pack(codes, scales, None, scheme), scheme, torch.float16)
    assert torch.equal(torch.from_numpy(weight), expected)


def test_the_lanes_of_every_warp_hold_the_scales_of_their_results(layer):
    codes, scales = layer
    packed = marlin.MarlinWeight.of(codes, scales[:1])
    loads = packed.scales.numpy().reshape(N // 64, 8, 8)
    for block, lane, tile, operand in np.ndindex(N // 64, 32, 4, 2):
        held = np.concatenate([loads[block, lane % 4], loads[block, lane % 4 + 4]]).reshape(8, 2)
        for index in range(4):
            column = 64 * block + 16 * tile + 8 * operand + c_column(lane, index)
            assert held[2 * tile + operand, index % 2] == scales[0, column].item()


def test_other_codes_for_measuring_have_memory_of_their_own(layer):
    first = marlin.MarlinWeight.of(*layer)
    other = first.with_random_codes(torch.Generator().manual_seed(1))
    assert other.codes.shape == first.codes.shape
    assert (other.codes != first.codes).double().mean() > 0.99
    assert torch.equal(other.scales, first.scales)
    assert other.scales.data_ptr() != first.scales.data_ptr()


@pytest.mark.parametrize(("in_features", "out_features", "named"), [(192, 256, "192"), (128, 384, "384")])
def test_a_shape_without_tiles_is_refused(in_features, out_features, named):
    assert named in marlin.why_not(in_features, out_features)
    codes = torch.zeros(out_features, in_features, dtype=torch.uint8)
    with pytest.raises(marlin.MarlinError, match=named):
        marlin.MarlinWeight.of(codes, torch.ones(1, out_features, dtype=torch.float16))


def test_other_groups_are_refused(layer):
    with pytest.raises(marlin.MarlinError, match="groups of 128"):
        marlin.MarlinWeight.of(layer[0], torch.ones(4, N, dtype=torch.float16))
    assert marlin.why_not(K, N) is None


def test_what_cannot_be_compiled_says_why(tmp_path, monkeypatch):
    with pytest.raises(marlin.MarlinError, match="no such file"):
        marlin.build(tmp_path / "absent.cu", tmp_path, (9, 0))
    source = tmp_path / "source.cu"
    source.write_text("int marlin_cuda;")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(marlin.MarlinError, match="nvcc is not in PATH"):
        marlin.build(source, tmp_path, (9, 0))
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'source.cu(1): warning' >&2\necho 'source.cu(2): error: so' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(marlin.MarlinError, match=r"^nvcc: source.cu\(2\): error: so$"):
        marlin.build(source, tmp_path, (9, 0))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_host_function_gets_every_argument_in_its_place(tmp_path, layer, monkeypatch):
    source = tmp_path / "peer.cu"
    source.write_text(PEER)
    kernel = marlin.Kernel(marlin.build(source, tmp_path, (9, 0)))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(device_index=3, cuda_stream=1 << 40)
    )
    codes, scales = layer
    x = torch.zeros(3, K, dtype=torch.float16)
    locks = marlin.locks_for(N, x.device)
    assert locks.shape == (N // 8,)
    weight = marlin.MarlinWeight.of(codes, scales)
    out = kernel(x, weight, locks)
    assert out.shape == (3, N)
    assert out.dtype == torch.float16
    assert out.view(torch.int64).flatten()[:14].tolist() == [
        x.data_ptr(), weight.codes.data_ptr(), weight.scales.data_ptr(), locks.data_ptr(),
        3, N, K, 128, 3, 1 << 40, -1, -1, -1, 16,
    ]  # fmt: skip
    by_column = marlin.MarlinWeight.of(codes, scales[:1])
    with pytest.raises(marlin.MarlinError, match="the shape"):
        kernel(x[:1], by_column, locks)
    with pytest.raises(marlin.MarlinError, match="no kernel"):
        kernel(x[:2], by_column, locks)
    with pytest.raises(marlin.MarlinError, match="bfloat16"):
        kernel(x.to(torch.bfloat16), weight, locks)
