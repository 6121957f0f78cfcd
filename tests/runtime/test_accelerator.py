"""Which backend serves accelerators, told with faked devices: none is here."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import BackendUnavailableError
from quantkit_runtime.kernels import ExpertsSpec, LinearSpec, ops, resolve, why_not
from quantkit_runtime.kernels.crossover import (
    DEFAULT_FUSED_ROWS,
    HOPPER_FUSED_ROWS,
    cache_file,
    fused_rows,
    save,
)

CUDA, XPU = torch.device("cuda"), torch.device("xpu")


def linear(device, scheme=Scheme(), dtype=torch.bfloat16, compute="16bit", sizes=(256, 96)):  # noqa: B008 - it is frozen
    return LinearSpec(*sizes, scheme, device, dtype, compute)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is an NVIDIA GPU of some compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    return pretend


def test_triton_serves_gpus_from_ampere_on_and_intels(gpu):
    gpu(8, 0)
    assert resolve("linear", linear(CUDA)).name == "triton"
    assert resolve("linear", linear(XPU)).name == "triton"
    gpu(7, 5)
    assert why_not("linear", "triton", linear(CUDA)) == (
        "it needs compute capability 8.0 or newer, this GPU has 7.5"
    )
    assert resolve("linear", linear(CUDA)).name == "reference"


def test_fp8_compute_needs_ada_or_hopper_bf16_and_an_nvidia_gpu(gpu):
    gpu(9, 0)
    assert resolve("linear", linear(CUDA, compute="fp8")).name == "triton-fp8"
    gpu(8, 6)
    reasons = {
        "8.9 or newer, this GPU has 8.6": linear(CUDA, compute="fp8"),
        "needs bf16 activations, not float16": linear(CUDA, compute="fp8", dtype=torch.float16),
        "needs an NVIDIA GPU, the weights are on xpu": linear(XPU, compute="fp8"),
        "multiples of 16": linear(CUDA, compute="fp8", sizes=(256, 104)),
    }
    for reason, spec in reasons.items():
        assert reason in why_not("linear", "triton-fp8", spec)
        with pytest.raises(BackendUnavailableError, match="no backend serves linear with compute 'fp8'"):
            resolve("linear", spec)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(bits=8), "it reads 4-bit codes, these have 8"),
        (Scheme(group_size=8), "groups of at least 16"),
        (Scheme(group_size=48), "groups of 16, 32, 64 or a multiple of 128 input features, not of 48"),
    ],
    ids=str,
)
def test_schemes_that_tiles_cannot_hold_go_to_the_reference(gpu, scheme, reason):
    gpu(9, 0)
    spec = linear(CUDA, scheme, sizes=(384, 96))
    assert reason in why_not("linear", "triton", spec)
    assert resolve("linear", spec).name == "reference"
    experts = ExpertsSpec(4, 384, 384, scheme, torch.nn.functional.silu, CUDA, torch.bfloat16)
    assert reason in why_not("experts", "triton", experts)


def test_without_triton_or_without_a_gpu_the_reason_says_so(gpu, monkeypatch):
    assert why_not("linear", "triton", linear(torch.device("cpu"))) == (
        "it needs the weights on a CUDA or XPU device, they are on cpu"
    )
    gpu(9, 0)
    monkeypatch.setattr("quantkit_runtime.kernels.accelerator._has_triton", lambda: False)
    assert "pip install triton" in why_not("linear", "triton", linear(CUDA))


def test_a_hopper_card_that_nobody_has_measured_unpacks_more_rows_in_registers_than_others(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("quantkit_runtime.kernels.crossover.device_name", lambda _device: "a new card")
    assert fused_rows(CUDA) == DEFAULT_FUSED_ROWS
    monkeypatch.setattr("quantkit_runtime.kernels.hopper_launch.runs_on", lambda _device: True)
    assert fused_rows(CUDA) == HOPPER_FUSED_ROWS


def test_a_measured_border_is_kept_for_the_user_and_a_damaged_file_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cpu")
    assert fused_rows(device) == DEFAULT_FUSED_ROWS
    save(device, 77)
    assert fused_rows(device) == 77
    cache_file().write_text("{", encoding="utf-8")
    save(device, 78)  # reads it, finds nothing, writes it anew
    assert fused_rows(device) == 78


@pytest.mark.parametrize(("index", "visited"), [(1, [1]), (0, []), (None, [])])
def test_kernels_are_launched_on_the_accelerator_that_holds_their_tensors(monkeypatch, index, visited):
    found = []

    @contextmanager
    def device_index(number):
        found.append(number)
        yield

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    launched = ops._on_device_of_first(lambda first, *rest, **named: (first, *rest, named))
    first = SimpleNamespace(device=device)
    assert launched(first, 2, three=3) == (first, 2, {"three": 3})
    assert found == visited


def test_every_operator_launches_its_kernel_so():
    assert len(ops.OPERATORS) == 6
    for name, function in ops.OPERATORS.items():
        assert function.__wrapped__, name
