"""The Hopper kernel, compiled for that GPU without one: its assembly, and the choice of its programs."""

import subprocess
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_runtime.kernels import hopper_launch
from quantkit_runtime.kernels.hopper_launch import STAGES, block_rows, fits, plan_for, plans, runs_on

gluon = pytest.importorskip("triton.experimental.gluon")


def assembler_says(tmp_path, monkeypatch, dtype="bf16", **constants):
    """Compile the kernel for compute capability 9.0 and activations of a dtype; return what ptxas reports of it."""
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
        "x_desc": described(dtype, [block, 128], 128, 16),
        "tiles_desc": described("i32", [128, 16], 64, 32),
        "scales_desc": described("fp16", [1, 128], 0, 16),
        "zeros_ptr": "*u8", "bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "partial_ptr": "*fp32",
        "flag_ptr": "*i32", "expert_ptr": "*i32", "start_ptr": "*i32",
    } | dict.fromkeys(["M", "N", "K", "G", "blocks", "experts", "rounds", "shared", "sharers"], "i32")  # fmt: skip
    constants = {"BIAS": True, "BN": 128, **constants}
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


@pytest.mark.parametrize("block", STAGES)
@pytest.mark.parametrize(
    "variant",
    [
        {"GROUP": 128, "ASYM": False, "EXPERTS": False},
        {"GROUP": 0, "ASYM": True, "EXPERTS": False, "dtype": "fp16"},
        {"GROUP": 128, "ASYM": True, "EXPERTS": True},
    ],
    ids=str,
)
def test_the_assembler_neither_spills_registers_nor_makes_the_tensor_cores_wait(
    block, variant, tmp_path, monkeypatch
):
    said = assembler_says(tmp_path, monkeypatch, BM=block, STAGES=STAGES[block], **variant)
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
    whole = plan_for(4608, 12288, 24, 132, 132)
    assert (whole.block, whole.rounds, whole.shared, whole.programs) == (256, 13, 12, 132)
    few = plan_for(64, 3072, 24, 132, 132)
    assert (few.block, few.rounds, few.shared, few.sharers) == (64, 0, 24, 96)
    # Without flags nobody can tell that its share is there.
    alone = plan_for(64, 3072, 24, 0, 132)
    assert alone.sharers == alone.shared == alone.programs == 24


@given(
    block=st.sampled_from(sorted(STAGES)),
    rows=st.integers(1, 5000),
    out_features=st.integers(1, 2000).map(lambda eighths: 8 * eighths),
    tiles=st.integers(1, 120),
    most_sharers=st.sampled_from([0, 3, 132]),
    multiprocessors=st.sampled_from([1, 78, 132]),
)
def test_a_plan_gives_out_every_part_and_no_empty_share(
    block, rows, out_features, tiles, most_sharers, multiprocessors
):
    parts = -(-rows // block) * -(-out_features // 128)
    found = list(plans(block, rows, out_features, tiles, most_sharers, multiprocessors))
    assert found
    for plan in found:
        assert plan.rounds * plan.programs + plan.shared == parts
        assert plan.shared <= plan.sharers <= plan.programs <= multiprocessors
        # A share is a tile or more, and no more than a part.
        assert plan.sharers <= max(plan.shared * tiles, 1)
        if plan.sharers > plan.shared:
            assert plan.sharers <= most_sharers


def launched(monkeypatch):
    """Return what the kernel would have been launched with, by the names of its parameters."""
    found = {}

    def run(kernel, grid, tensors, sizes, counts, constants, *, warps, described):
        del warps
        found.update(zip(kernel.arg_names, (*described, *tensors, *sizes, *counts), strict=False), grid=grid)
        found.update(constants)
        assert len(found) == len(kernel.arg_names) + 1

    monkeypatch.setattr(hopper_launch, "run_kernel", run)
    return found


def test_the_kernel_gets_descriptors_of_whole_matrices_and_flags_of_the_layer(monkeypatch):
    found = launched(monkeypatch)
    x, tiles = torch.zeros(200, 384, dtype=torch.bfloat16), torch.zeros(3, 1000, 16, dtype=torch.int32)
    scales, flags = torch.zeros(3, 1000, dtype=torch.float16), torch.zeros(8, dtype=torch.int32)
    out = hopper_launch.multiply(x, tiles, scales, None, None, flags, 128)
    assert out.shape == (200, 1000)
    for name, tensor, box in (("x_desc", x, 128), ("tiles_desc", tiles, 16), ("scales_desc", scales, 128)):
        described = found[name]
        assert described.base.data_ptr() == tensor.data_ptr()
        assert described.base.dtype == tensor.dtype
        assert described.shape[0] * described.shape[1] == tensor.numel()
        assert described.block_shape[1] == box
    assert found["flag_ptr"] is flags
    assert (found["N"], found["K"], found["G"], found["M"]) == (1000, 384, 3, 200)


def test_sums_of_shares_are_float32_whatever_the_default_dtype(monkeypatch):
    found = launched(monkeypatch)
    monkeypatch.setattr(hopper_launch, "multiprocessors", lambda _device: 132)
    x, tiles = torch.zeros(64, 3072, dtype=torch.bfloat16), torch.zeros(24, 256, 16, dtype=torch.int32)
    scales, flags = torch.zeros(24, 256, dtype=torch.float16), torch.zeros(264, dtype=torch.int32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        hopper_launch.multiply(x, tiles, scales, None, None, flags, 128)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["sharers"] > found["shared"] > 0
    assert found["partial_ptr"].dtype == torch.float32
    assert found["partial_ptr"].numel() == found["sharers"] * found["BM"] * 128


def test_rows_that_begin_at_an_odd_address_are_copied_to_where_tma_reads(monkeypatch):
    found = launched(monkeypatch)
    x = torch.zeros(64 * 128 + 1, dtype=torch.bfloat16)[1:].view(64, 128)
    tiles, scales = torch.zeros(1, 8, 16, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.float16)
    hopper_launch.multiply(x, tiles, scales, None, None, torch.zeros(8, dtype=torch.int32), 128)
    assert found["x_desc"].base.data_ptr() % 16 == 0


def test_a_descriptor_keeps_no_tensor_in_memory(monkeypatch):
    launched(monkeypatch)
    x = torch.zeros(64, 128, dtype=torch.bfloat16)
    tiles, scales = torch.zeros(1, 8, 16, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.float16)
    gone = weakref.ref(x)
    hopper_launch.multiply(x, tiles, scales, None, None, torch.zeros(8, dtype=torch.int32), 128)
    del x
    assert gone() is None


def test_blocks_of_an_experts_rows_are_as_large_as_their_number():
    assert [block_rows(rows) for rows in (1, 64, 65, 200, 4000)] == [64, 64, 128, 256, 256]
