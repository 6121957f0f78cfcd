"""Choice of a kernel backend for a packed layer.

A backend registers, for one operation, a requirement (why it cannot serve a layer, or None) and a priority. The
choice is made once per layer, when the layer is prepared, never in the forward pass. Any backend can be asked
for by name, and every refusal states its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import BackendUnavailableError

COMPUTE_MODES = ("16bit", "fp8")


@dataclass(frozen=True)
class LinearSpec:
    """What a backend has to know to accept or refuse a packed Linear layer.

    Attributes:
        in_features: K.
        out_features: N.
        scheme: How the weight is stored.
        device: Where the packed tensors are.
        dtype: Floating dtype of the activations that the layer is prepared for. A kernel must also serve other
            floating dtypes, correctly if not fast.
        compute: ``"16bit"`` (activations as they come) or ``"fp8"``.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    compute: str = "16bit"


@dataclass(frozen=True)
class ExpertsSpec:
    """What a backend has to know to accept or refuse the packed experts of a layer.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        scheme: How the weights are stored.
        activation: Applied to what the gate gives.
        device: Where the packed tensors are.
        dtype: As in `LinearSpec`.
        compute: As in `LinearSpec`.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    scheme: Scheme
    activation: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype
    compute: str = "16bit"


class LinearKernel(Protocol):
    """A prepared layer: maps activations (..., K) to (..., N) in the dtype and on the device of the input.

    Attributes:
        extra_bytes: What it keeps in memory beside the stored tensors.
    """

    extra_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""


class ExpertsKernel(Protocol):
    """Prepared experts: maps (T, H) activations, (T, k) experts and (T, k) weights to (T, H).

    Attributes:
        extra_bytes: What it keeps in memory beside the stored tensors.
    """

    extra_bytes: int

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts."""


# Called with the spec of the operation: LinearSpec for "linear", ExpertsSpec for "experts".
Requirement = Callable[[Any], str | None]
# "linear": spec, packed tensors, bias -> LinearKernel.
# "experts": spec, packed stacks of gate and up, those of down -> ExpertsKernel.
Prepare = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """One registered implementation of an operation.

    Attributes:
        op: Operation, ``"linear"`` or ``"experts"``.
        name: Name to ask for it by.
        priority: The highest that can serve a layer is chosen; the reference has 0.
        requirement: Returns None where the backend can serve the layer, else the reason why not.
        prepare: Makes the kernel from the layer's tensors. It must not modify them.
        layout: What it wants ``qweight`` as: ``"stored"``, as in the checkpoint, or ``"tiles"``, see
            `quantkit_runtime.kernels.tiles`.
    """

    op: str
    name: str
    priority: int
    requirement: Requirement
    prepare: Prepare
    layout: str = "stored"


_REGISTRY: dict[tuple[str, str], Backend] = {}


def register(
    op: str, name: str, *, priority: int, requirement: Requirement, layout: str = "stored"
) -> Callable[[Prepare], Prepare]:
    """Register the decorated ``prepare`` function as a backend.

    Args:
        op: Operation it implements.
        name: Unique name within the operation.
        priority: See :class:`Backend`.
        requirement: See :class:`Backend`.
        layout: See :class:`Backend`.
    """

    def add(prepare: Prepare) -> Prepare:
        if (op, name) in _REGISTRY:
            raise ValueError(f"backend {name!r} is already registered for {op!r}")
        _REGISTRY[op, name] = Backend(op, name, priority, requirement, prepare, layout)
        return prepare

    return add


def backends(op: str) -> list[Backend]:
    """Backends of an operation, highest priority first."""
    found = [backend for backend in _REGISTRY.values() if backend.op == op]
    return sorted(found, key=lambda backend: -backend.priority)


def check_backend(op: str, name: str) -> None:
    """Refuse a name that no backend of an operation has.

    Raises:
        BackendUnavailableError: With those there are.
    """
    if (op, name) not in _REGISTRY:
        known = ", ".join(backend.name for backend in backends(op))
        raise BackendUnavailableError(f"backend {name!r} does not exist; use 'auto' or one of: {known}")


def why_not(op: str, name: str, spec: LinearSpec | ExpertsSpec) -> str | None:
    """Reason why the named backend cannot serve the layer, or None if it can.

    Raises:
        BackendUnavailableError: There is no backend of that name.
    """
    check_backend(op, name)
    return _REGISTRY[op, name].requirement(spec)


def resolve(op: str, spec: LinearSpec | ExpertsSpec, backend: str = "auto") -> Backend:
    """Choose the backend for a layer.

    Args:
        op: Operation.
        spec: The layer.
        backend: ``"auto"`` or the name of one.

    Raises:
        BackendUnavailableError: The named backend, or every backend, refuses the layer; the message has the
            reasons.
    """
    if backend != "auto":
        reason = why_not(op, backend, spec)
        if reason is not None:
            raise BackendUnavailableError(f"backend {backend!r} cannot run here: {reason}")
        return _REGISTRY[op, backend]
    reasons = []
    for candidate in backends(op):
        reason = candidate.requirement(spec)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendUnavailableError(
        f"no backend serves {op} with compute {spec.compute!r} on {spec.device} ({'; '.join(reasons)})"
    )


def resolve_compute(compute: str) -> str:
    """Translate the user's ``compute`` argument; ``"auto"`` means ``"16bit"``.

    Raises:
        BackendUnavailableError: Unknown mode.
    """
    if compute == "auto":
        return "16bit"
    if compute not in COMPUTE_MODES:
        raise BackendUnavailableError(f"compute {compute!r} does not exist; use 'auto' or one of {COMPUTE_MODES}")
    return compute
