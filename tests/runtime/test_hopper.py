"""The Hopper kernel, compiled for that GPU without one: its assembly, and the choice of its programs."""

import subprocess

import pytest
import torch

from quantkit_runtime.kernels.hopper_launch import _SHAPES, _plan, block_rows, fits, runs_on

gluon = pytest.importorskip("triton.experimental.gluon")


def assembler_says(tmp_path, monkeypatch, **constants):
    """Compile the kernel for compute capability 9.0; return what ptxas reports of it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from quantkit_runtime.kernels.hopper import multiply_kernel as kernel

    def described(dtype, shape, swizzle, bits):
        return f"tensordesc<{dtype}{shape},{gl.NVMMASharedLayout(swizzle, bits, 2)!r}>"

    block = constants["BM"]
    types = {
        "x_desc": described("bf16", [block, 128], 128, 16),
        "tiles_desc": described("i32", [128, 16], 64, 32),
        "scales_desc": described("fp16", [1, 128], 0, 16),
        "zeros_ptr": "*u8", "bias_ptr": "*bf16", "out_ptr": "*bf16", "partial_ptr": "*fp32", "counter_ptr": "*i32",
        "expert_ptr": "*i32", "start_ptr": "*i32",
    } | dict.fromkeys(["M", "N", "K", "G", "blocks", "experts"], "i32")  # fmt: skip
    constants = {"GROUP": 128, "BIAS": True, "BN": 128, **constants}
    place = {name: number for number, name in enumerate(kernel.arg_names)}
    source = GluonASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {(place[name],): value for name, value in constants.items()},
        {(place[name],): [["tt.divisibility", 16]] for name in types if name.endswith("_ptr") or name in "NK"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 227 * 1024
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    ptxas = triton.knobs.nvidia.ptxas.path
    command = [ptxas, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stderr


@pytest.mark.parametrize("block", _SHAPES)
@pytest.mark.parametrize("variant", [(1, False, False), (4, True, False), (1, True, True)], ids=str)
def test_the_assembler_neither_spills_registers_nor_makes_the_tensor_cores_wait(
    block, variant, tmp_path, monkeypatch
):
    split, asym, experts = variant
    stages = _SHAPES[block].stages
    said = assembler_says(tmp_path, monkeypatch, BM=block, STAGES=stages, SPLIT=split, ASYM=asym, EXPERTS=experts)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said


def test_it_serves_whole_tiles_and_groups_of_whole_tiles():
    assert fits(3072, 12288, 128)
    assert fits(3072, 8, 0)
    assert not fits(3072, 12288, 64)
    assert not fits(3040, 12288, 0)
    assert not fits(3072, 12, 128)
    assert not runs_on(torch.device("cpu"))


def test_many_rows_take_large_blocks_and_few_parts_share_the_input_features():
    assert _plan(4608, 12288, 24, 384, 132) == (256, 1)
    assert _plan(64, 12288, 24, 384, 132) == (64, 1)
    assert _plan(64, 3072, 24, 96, 132) == (64, 4)
    # Without counters nobody can tell which program is the last.
    assert _plan(64, 3072, 24, 0, 132)[1] == 1
    # No share is empty, however few tiles there are.
    for tiles in range(1, 9):
        shares = _plan(64, 256, tiles, 100, 132)[1]
        share = -(-tiles // shares)
        assert (shares - 1) * share < tiles


def test_blocks_of_an_experts_rows_are_as_large_as_their_number():
    assert [block_rows(rows) for rows in (1, 64, 65, 200, 4000)] == [64, 64, 128, 256, 256]
