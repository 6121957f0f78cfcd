"""What this machine has, and which kernel backend each operation would take on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.kernels import ExpertsSpec, LinearSpec, backends, why_not
from quantkit_runtime.kernels.dispatch import COMPUTE_MODES

OPERATIONS = ("linear", "experts")
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """A device that a model can run on.

    Attributes:
        name: As torch calls it, e.g. ``cuda:0``.
        hardware: What it is.
        memory_bytes: Its memory, None if that cannot be known.
        free_bytes: What is free of it now, likewise.
        details: More about it, by name: driver, compute capability, instruction set.
    """

    name: str
    hardware: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The backend that an operation would take.

    Attributes:
        device: Where.
        op: ``"linear"`` or ``"experts"``.
        compute: ``"16bit"`` or ``"fp8"``.
        backend: Name of the backend, None if none can serve.
        others: The backends that were passed over, best first, with the reason; an empty reason means that it could
            serve, only slower.
    """

    device: str
    op: str
    compute: str
    backend: str | None
    others: dict[str, str]


@dataclass(frozen=True)
class Package:
    """A package that some use needs.

    Attributes:
        name: As pip calls it.
        version: None if it is not installed.
        problem: Why it cannot be used though it is installed; empty if it can, or if that was not tried.
    """

    name: str
    version: str | None
    problem: str = ""


def list_devices() -> list[Device]:
    """Return the accelerators that torch sees, then the CPU."""
    devices = []
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        devices = [_describe_accelerator(kind.type, index) for index in range(torch.accelerator.device_count())]
    return [*devices, _describe_cpu()]


def choose_backends(devices: Iterable[str], dtype: torch.dtype = torch.bfloat16) -> list[Choice]:
    """Return what each operation takes on each device, in each compute mode.

    The layers asked for are those of `example_specs`.

    Args:
        devices: As torch calls them.
        dtype: Of the activations.
    """
    choices = []
    for device in devices:
        for compute in COMPUTE_MODES:
            for op, spec in example_specs(torch.device(device), dtype, compute).items():
                reasons = {backend.name: why_not(op, backend.name, spec) for backend in backends(op)}
                chosen = next((name for name, reason in reasons.items() if reason is None), None)
                others = {name: reason or "" for name, reason in reasons.items() if name != chosen}
                choices.append(Choice(device, op, compute, chosen, others))
    return choices


def example_specs(device: torch.device, dtype: torch.dtype, compute: str) -> dict[str, LinearSpec | ExpertsSpec]:
    """Return a layer for each operation: a feed-forward of FLUX.1-dev, experts of Qwen3-Omni; W4, groups of 128."""
    scheme = Scheme()
    return {
        "linear": LinearSpec(3072, 12288, scheme, device, dtype, compute),
        "experts": ExpertsSpec(128, 2048, 768, scheme, functional.silu, device, dtype, compute),
    }


def look_up_package(name: str, *, module: str | None = None) -> Package:
    """Return what is known of a package.

    Args:
        name: As pip calls it.
        module: Import this to see whether it works; None to ask for the version alone, which costs nothing.
    """
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None)
    if module is None:
        return Package(name, version)
    try:
        if find_spec(module) is None:
            return Package(name, version, f"there is no module {module}")
        import_module(module)
    except Exception as error:  # noqa: BLE001  (whatever a broken build raises is what has to be told)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return Package(name, version, f"import {module} fails: {reason}")
    return Package(name, version)


def torch_build() -> str:
    """Return what torch was built for, e.g. ``CUDA 13.0``, or ``CPU``."""
    for label, attribute in (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu")):
        version = getattr(torch.version, attribute, None)
        if version:
            return f"{label} {version}"
    return "CPU"


def explain_no_accelerator() -> str:
    """Return why torch sees no accelerator, as far as that can be told, with the mend."""
    build, driver = torch_build(), _nvidia_driver()
    if driver is not None and build == "CPU":
        return (
            f"NVIDIA driver {driver} is loaded, but this torch is built for the CPU; install a CUDA build of torch"
        )
    if driver is not None:
        return f"NVIDIA driver {driver} is loaded, but torch (built for {build}) cannot use it; see `nvidia-smi`"
    if build == "CPU":
        return "this torch is built for the CPU"
    return f"torch is built for {build}, but there is no driver or no device of that kind"


def _describe_accelerator(kind: str, index: int) -> Device:
    name, backend = f"{kind}:{index}", getattr(torch, kind, None)
    properties = _ask(backend, "get_device_properties", index)
    memory = _ask(backend, "mem_get_info", index)  # of CUDA and of XPU alike
    total = getattr(properties, "total_memory", None)
    details = {}
    if kind == "cuda" and torch.version.hip is None and hasattr(properties, "major"):
        details["compute capability"] = f"{properties.major}.{properties.minor}"
    driver = getattr(properties, "driver_version", None) or (_nvidia_driver() if kind == "cuda" else None)
    if driver:
        details["driver"] = str(driver)
    hardware = getattr(properties, "name", None) or kind
    return Device(name, str(hardware), total, memory[0] if memory else None, details)


def _ask(backend: Any, function: str, index: int) -> Any:
    """Return what a function of torch's module for a device says, None if it has none or cannot tell."""
    try:
        return getattr(backend, function)(index)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def _nvidia_driver() -> str | None:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", _NVIDIA_DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group(1) if found else None


def _describe_cpu() -> Device:
    hardware = _field(_CPU_INFO, "model name") or platform.processor() or platform.machine()
    details = {
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count() or "unknown"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "C++ compiler (for torch.compile)": _compiler() or "none",
    }
    return Device("cpu", hardware, _kilobytes("MemTotal"), _kilobytes("MemAvailable"), details)


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def _kilobytes(name: str) -> int | None:
    value = _field(_MEMORY_INFO, name)
    return int(value.split()[0]) * 1024 if value else None


def _field(path: Path, name: str) -> str | None:
    """Return the first value of a name in a file of ``name: value`` lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:  # not Linux
        return None
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else None
