"""Kernel backends. Importing this package registers all of them with :mod:`quantkit_runtime.kernels.dispatch`."""

from quantkit_runtime.kernels import accelerator, cpu, cpu_experts, reference, xpu
from quantkit_runtime.kernels.dispatch import (
    Backend,
    ExpertsKernel,
    ExpertsSpec,
    LinearKernel,
    LinearSpec,
    backends,
    check_backend,
    register,
    resolve,
    resolve_compute,
    why_not,
)

__all__ = [
    "Backend",
    "ExpertsKernel",
    "ExpertsSpec",
    "LinearKernel",
    "LinearSpec",
    "accelerator",
    "backends",
    "check_backend",
    "cpu",
    "cpu_experts",
    "reference",
    "register",
    "resolve",
    "resolve_compute",
    "why_not",
    "xpu",
]
