"""Tensor files against the safetensors library, and what is read in blocks against what was written."""

import math
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import read_header
from quantkit.errors import CheckpointError
from quantkit.quantize import tensors as module
from quantkit.quantize.tensors import TensorFile, are_equal, open_threads, read_blocks, read_rows, read_tensor

TENSORS = {
    "odd": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "words": torch.arange(-6, 6, dtype=torch.int32).view(3, 4),
    "half": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch.float16),
    "bool": torch.tensor([True, False, True]),
    "double": torch.randn(3, dtype=torch.float64),
    "fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
}


def write(path, tensors):
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorFile(path, layout) as file, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: file.write(name, [tensors[name]]), reversed(tensors)))


def test_what_threads_write_in_any_order_the_safetensors_library_reads(tmp_path):
    write(tmp_path / "file", TENSORS)
    read = load_file(tmp_path / "file")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_of_a_written_file_is_aligned_and_everyone_may_read_it(tmp_path):
    write(tmp_path / "file", TENSORS)
    infos = read_header(tmp_path / "file")
    assert all(infos[name].offset % tensor.itemsize == 0 for name, tensor in TENSORS.items())
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_tensor_can_be_written_in_parts_but_not_short(tmp_path):
    tensor = torch.arange(10)
    with TensorFile(tmp_path / "file", {"a": ((10,), tensor.dtype)}) as file:
        file.write("a", tensor.split(3))
        with pytest.raises(AssertionError):
            file.write("a", [tensor[:9]])
    assert torch.equal(read_tensor(read_header(tmp_path / "file")["a"]), tensor)


def test_a_file_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "file", {})
    assert (tmp_path / "file").read_text() == "precious"


def test_read_tensor_reads_every_dtype_and_shape(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    infos = read_header(tmp_path / "file")
    for name, tensor in TENSORS.items():
        read = read_tensor(infos[name])
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_blocks_of_rows_begin_at_multiples_of_32_and_cover_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 7 * 70)
    weight = torch.randn(70, 7)
    save_file({"w": weight}, tmp_path / "file")
    info = read_header(tmp_path / "file")["w"]
    blocks = list(read_rows(info))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 64), (64, 70)]
    assert all(torch.equal(block, weight[rows]) for rows, block in blocks)
    flat = list(read_blocks(info))
    assert torch.equal(torch.cat(flat), weight.flatten())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(tmp_path, monkeypatch, value, dtype):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 10)
    weight = torch.ones(35, dtype=dtype)
    weight[33] = value
    save_file({"w": weight}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file: w: holds NaN or infinity; copy the model again"):
        list(read_blocks(read_header(tmp_path / "file")["w"]))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    save_file({"w": torch.ones(100)}, tmp_path / "file")
    info = read_header(tmp_path / "file")["w"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="file: w: became shorter while it was read"):
        read_tensor(info)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.ones(4), torch.ones(2, 2), False),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), False),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_equal_means_dtype_shape_and_bits(tmp_path, one, other, equal):
    save_file({"one": one, "other": other}, tmp_path / "file")
    infos = read_header(tmp_path / "file")
    assert are_equal(infos["one"], infos["other"]) == equal


def test_threads_compute_alone_and_torch_has_its_own_back_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_threads() as threads:
            assert threads.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_work_that_has_not_begun_is_dropped_when_one_fails():
    begun = []

    def fail(number):
        begun.append(number)
        raise ValueError("stop")

    with pytest.raises(ValueError, match=r"^stop$"), open_threads() as threads:
        list(threads.map(fail, range(1000)))
    assert len(begun) < 1000
