"""Devices are checked before anything is done on them."""

import types

import pytest
import torch

from quantkit.errors import RecipeError
from quantkit.quantize.devices import resolve_devices


@pytest.fixture
def two_gpus(monkeypatch):
    cuda = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", ("cuda:0",)),
        ("cuda", ("cuda:0",)),
        ("cpu", ("cpu",)),
        ("cuda:1", ("cuda:1",)),
        ("cuda:1, cuda:0", ("cuda:1", "cuda:0")),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_devices_that_are_here(text, devices):
    assert resolve_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cuda:2", "--device: cuda:2 is not here; this machine has cpu, cuda:0, cuda:1"),
        ("xpu", "--device: xpu is not here"),
        ("GPU 0", "--device: 'GPU0' is no device"),
        ("cuda:0,", "--device: 'cuda:0,' is no device"),
        ("cuda:0,cuda", "name each accelerator once"),
        ("cuda:0,cpu", "or cpu alone"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_devices_that_are_not(text, reason):
    with pytest.raises(RecipeError, match=reason):
        resolve_devices(text)


@pytest.mark.usefixtures("no_gpu")
def test_without_an_accelerator_auto_is_the_cpu_and_cuda_is_refused():
    assert resolve_devices("auto") == ("cpu",)
    with pytest.raises(RecipeError, match=r"--device: cuda:0 is not here; this machine has cpu$"):
        resolve_devices("cuda:0")
