"""What is told of a machine, and the self-test: it must be able to fail."""

from types import SimpleNamespace

import pytest
import torch

from quantkit_runtime import diagnosis
from quantkit_runtime.diagnosis import choose_backends, list_devices, look_up_package
from quantkit_runtime.kernels import backends, register
from quantkit_runtime.kernels.dispatch import _REGISTRY
from quantkit_runtime.selftest import SCHEMES, count_checks, run_checks


@pytest.fixture
def broken_backend():
    """Register a linear backend that computes with the given function: ``broken_backend(function)``."""

    def add(compute):
        @register("linear", "broken", priority=-1, requirement=lambda _: None)
        def prepare(spec, tensors, bias):
            del tensors, bias

            class Kernel:
                extra_bytes = 0

                def __call__(self, x):
                    return compute(x.new_zeros(*x.shape[:-1], spec.out_features))

            return Kernel()

    yield add
    _REGISTRY.pop(("linear", "broken"), None)


def test_the_cpu_is_always_there_and_described():
    cpu = list_devices()[-1]
    assert cpu.name == "cpu"
    assert cpu.hardware
    assert cpu.memory_bytes > cpu.free_bytes > 0
    assert cpu.details["threads"] == str(torch.get_num_threads())


def test_accelerators_of_any_kind_are_listed_with_what_they_tell(monkeypatch):
    properties = SimpleNamespace(name="Arc", total_memory=16 << 30, driver_version="1.6")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: properties)

    def cannot_tell(_):
        raise RuntimeError

    monkeypatch.setattr(torch.xpu, "mem_get_info", cannot_tell)
    first, second, cpu = list_devices()
    assert (first.name, second.name, cpu.name) == ("xpu:0", "xpu:1", "cpu")
    assert (first.hardware, first.memory_bytes, first.free_bytes) == ("Arc", 16 << 30, None)
    assert first.details == {"driver": "1.6"}


@pytest.mark.parametrize(
    ("build", "driver", "told"),
    [
        ("CPU", "580.1", "NVIDIA driver 580.1 is loaded, but this torch is built for the CPU"),
        ("CUDA 13.0", "580.1", "cannot use it"),
        ("CPU", None, "this torch is built for the CPU"),
        ("CUDA 13.0", None, "torch is built for CUDA 13.0, but there is no driver"),
    ],
)
def test_a_missing_accelerator_is_explained(monkeypatch, build, driver, told):
    monkeypatch.setattr(diagnosis, "torch_build", lambda: build)
    monkeypatch.setattr(diagnosis, "_nvidia_driver", lambda: driver)
    assert told in diagnosis.explain_no_accelerator()


def test_every_backend_is_chosen_or_passed_over_with_a_reason():
    choices = {(choice.op, choice.compute): choice for choice in choose_backends(["cpu"])}
    assert choices["linear", "16bit"].backend == "cpu"
    assert choices["linear", "16bit"].others["reference"] == ""
    assert choices["linear", "fp8"].backend is None
    assert choices["linear", "fp8"].others["cpu"] == "it computes in 16 bit, not in fp8"
    for choice in choices.values():
        named = {choice.backend, *choice.others} - {None}
        assert named == {backend.name for backend in backends(choice.op)}


def test_a_package_is_present_missing_or_broken():
    assert look_up_package("torch", module="torch").version
    assert look_up_package("no-such-package").version is None
    assert look_up_package("torch", module="no_such_module").problem == "there is no module no_such_module"


def test_a_package_that_does_not_import_is_told(monkeypatch, tmp_path):
    (tmp_path / "torn.py").write_text("raise RuntimeError('operator torn::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = look_up_package("torch", module="torn").problem
    assert problem == "import torn fails: operator torn::nms does not exist"


def test_the_backends_of_this_machine_pass_with_every_way_of_storing():
    checks = list(run_checks(["cpu"], seconds=120))
    assert len(checks) == count_checks(["cpu"])
    assert {check.outcome for check in checks} == {"PASS", "refused"}
    passed = [check for check in checks if check.outcome == "PASS"]
    for op, name in (("linear", "reference"), ("linear", "cpu"), ("experts", "reference")):
        assert len({check.scheme for check in passed if (check.op, check.backend) == (op, name)}) == len(SCHEMES)
    assert all(0 < check.error <= check.bound for check in passed)


def raise_error(_):
    raise RuntimeError("misaligned address\nand more")


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda out: out, "the error is too large"),
        (lambda out: out * float("nan"), "the error is too large"),
        (raise_error, "RuntimeError: misaligned address"),
    ],
    ids=["zeros", "nan", "raises"],
)
def test_a_backend_that_computes_something_else_fails(broken_backend, compute, reason):
    broken_backend(compute)
    outcomes = {(check.outcome, check.reason) for check in run_checks(["cpu"], 120) if check.backend == "broken"}
    assert outcomes == {("FAIL", reason)}


def test_what_there_was_no_time_for_is_said_not_to_have_run():
    assert {check.outcome for check in run_checks(["cpu"], seconds=-1)} == {"not run"}
