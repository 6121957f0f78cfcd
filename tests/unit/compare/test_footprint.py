import sys

import numpy as np
import pytest
import torch

from quantkit.checkpoint import open_model
from quantkit.compare import footprint
from quantkit.compare.footprint import PeakMemory, disk_bytes, quantization_of, weight_bytes
from quantkit_runtime import W4A16Linear

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def test_weights_are_counted_by_component_and_shared_ones_once():
    tied = torch.nn.Linear(10, 10, bias=False)
    tied.register_buffer("table", torch.zeros(3, dtype=torch.int32))
    other = torch.nn.Linear(10, 10, bias=False)
    other.weight = tied.weight
    assert weight_bytes({"a": tied, "b": other, "tokenizer": object()}) == {"a": 412, "b": 0}


def test_what_a_kernel_keeps_beside_packed_weights_is_counted():
    layer = W4A16Linear(128, 64, bias=False)
    packed = sum(buffer.nbytes for buffer in layer.buffers())
    layer.prepare(torch.bfloat16, backend="reference")
    assert weight_bytes({"a": layer}) == {"a": packed}
    layer.prepare(torch.bfloat16, backend="cpu")
    assert weight_bytes({"a": layer})["a"] >= packed + 128 * 64 * 2


@linux
def test_the_peak_counts_memory_that_is_free_again():
    memory = PeakMemory(torch.device("cpu"))
    block = np.ones(64 * MIB, np.uint8)
    del block
    peak, how = memory.read()
    assert 60 * MIB < peak < 100 * MIB
    assert "resident memory" in how


@linux
def test_the_peak_leaves_out_what_an_excluded_block_uses_and_keeps():
    memory = PeakMemory(torch.device("cpu"))
    with memory.excluded():
        kept = np.ones(64 * MIB, np.uint8)
        passing = np.ones(64 * MIB, np.uint8)
        del passing
    own = np.ones(32 * MIB, np.uint8)
    peak, _ = memory.read()
    assert 28 * MIB < peak < 60 * MIB
    assert kept.size + own.size == 96 * MIB


def test_a_peak_that_cannot_be_measured_is_none_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(footprint, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    memory = PeakMemory(torch.device("cpu"))
    with memory.excluded():
        pass
    peak, reason = memory.read()
    assert peak is None
    assert reason.startswith("unavailable: ")


def test_size_and_scheme_of_a_folder_are_read_by_component(model):
    plain, packed = open_model(model("plain")), open_model(model("packed", error=0.1))
    assert quantization_of(plain) == {}
    assert quantization_of(packed) == {"transformer": "W4A16, group 128, symmetric"}
    files = list((packed.folder / "transformer").iterdir())
    assert disk_bytes(packed)["transformer"] == sum(file.stat().st_size for file in files)
