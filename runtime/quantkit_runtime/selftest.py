"""A short test of the kernel backends on the machine at hand, each against a float64 product."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import BackendUnavailableError
from quantkit_runtime.experts import PROJECTIONS, W4A16Experts
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.kernels import backends
from quantkit_runtime.kernels.dispatch import COMPUTE_MODES
from quantkit_runtime.linear import W4A16Linear
from quantkit_runtime.packed import PackedLayer
from quantkit_runtime.rounding import quantize_rtn

SECONDS = 10.0
SCHEMES = (
    Scheme(),
    Scheme(group_size=64, sym=False),
    Scheme(sym=False, packing_format="auto_round:auto_awq"),
    Scheme(group_size=32, sym=False, packing_format="auto_round"),
    Scheme(group_size=-1),
    Scheme(bits=8),
)
# Numbers of rows and tokens that take every kernel of every backend, with the built-in borders between them.
_IN_FEATURES, _OUT_FEATURES, _ROWS = 512, 320, (1, 5, 130, 2100)
_EXPERTS, _HIDDEN, _INNER, _TOP_K, _TOKENS = 4, 256, 128, 2, (1, 40, 100)
# Relative to the norm of the output. 16 bit: some roundings to bf16, 2**-9 each; fp8: weights and activations are
# rounded to 4 significant bits on top.
BOUNDS = {
    ("linear", "16bit"): 8e-3,
    ("linear", "fp8"): 6e-2,
    ("experts", "16bit"): 1.5e-2,
    ("experts", "fp8"): 1e-1,
}

Call = tuple[tuple[Tensor, ...], Tensor]
"""Arguments of a layer, and what it has to give in float64."""


@dataclass(frozen=True)
class Check:
    """One backend with one way of storing weights.

    Attributes:
        device: Where it ran.
        op: ``"linear"`` or ``"experts"``.
        compute: ``"16bit"`` or ``"fp8"``.
        backend: Its name.
        scheme: How the weights were stored.
        outcome: ``"PASS"``, ``"FAIL"``, ``"refused"`` (the backend says that it cannot serve) or ``"not run"`` (the
            time was up).
        error: Largest error over the shapes, relative to the norm of the output; None if nothing ran.
        bound: What the error may be.
        reason: Why it failed or was refused; empty otherwise.
    """

    device: str
    op: str
    compute: str
    backend: str
    scheme: str
    outcome: str
    error: float | None
    bound: float
    reason: str = ""


def count_checks(devices: list[str]) -> int:
    """Return how many checks `run_checks` yields."""
    return sum(len(backends(op)) for op, _ in BOUNDS) * len(SCHEMES) * len(devices)


def run_checks(devices: list[str], seconds: float = SECONDS) -> Iterator[Check]:
    """Yield a check for each device, operation, compute mode, backend and way of storing weights.

    Args:
        devices: As torch calls them.
        seconds: When these are up, the rest is not run.
    """
    end = time.monotonic() + seconds
    for scheme in SCHEMES:  # so that every backend has had its turn when the time is up
        for device in devices:
            for op, make_case in (("linear", _make_linear), ("experts", _make_experts)):
                layer, calls = make_case(scheme)
                layer.to(device)
                for compute in COMPUTE_MODES:
                    for backend in backends(op):
                        known = partial(Check, device, op, compute, backend.name, _label(scheme))
                        yield _check(known, layer, calls, end)


def _check(known: Callable[..., Check], layer: PackedLayer, calls: list[Call], end: float) -> Check:
    """Run one backend unless ``end``, of the monotonic clock, is past."""
    asked = known("not run", None, 0.0)
    bound = BOUNDS[asked.op, asked.compute]
    if time.monotonic() > end:
        return known("not run", None, bound, "the time was up")
    try:
        layer.prepare(torch.bfloat16, compute=asked.compute, backend=asked.backend)
        error = _largest_error(layer, calls, asked.device)
    except BackendUnavailableError as refusal:
        return known("refused", None, bound, str(refusal).rpartition("cannot run here: ")[2])
    except Exception as failure:  # noqa: BLE001  (whatever a kernel raises is a finding)
        reason = next(iter(str(failure).splitlines()), "")
        return known("FAIL", None, bound, f"{type(failure).__name__}: {reason}")
    if error <= bound:  # not so for NaN
        return known("PASS", error, bound)
    return known("FAIL", error, bound, "the error is too large")


@torch.inference_mode()
def _largest_error(layer: PackedLayer, calls: list[Call], device: str) -> float:
    """Return the largest error over some calls, NaN if there is one."""
    errors = []
    for arguments, exact in calls:
        out = layer(*(tensor.to(device) for tensor in arguments)).double().cpu()
        errors.append(torch.linalg.vector_norm(out - exact) / torch.linalg.vector_norm(exact))
    return float(torch.stack(errors).max())


def _make_linear(scheme: Scheme) -> tuple[PackedLayer, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    layer = W4A16Linear(
        _IN_FEATURES,
        _OUT_FEATURES,
        group_size=scheme.group_size,
        bits=scheme.bits,
        sym=scheme.sym,
        packing_format=scheme.packing_format,
    )
    state, weight = _make_weight(_OUT_FEATURES, _IN_FEATURES, scheme, generator)
    bias = torch.randn(_OUT_FEATURES, generator=generator).to(torch.float16)
    layer.load_state_dict(state | {"bias": bias})
    calls: list[Call] = []
    for rows in _ROWS:
        x = torch.randn(rows, _IN_FEATURES, generator=generator).to(torch.bfloat16)
        calls.append(((x,), x.double() @ weight.t() + bias.double()))
    return layer, calls


def _make_experts(scheme: Scheme) -> tuple[PackedLayer, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    layer = W4A16Experts(_EXPERTS, _HIDDEN, _INNER, scheme=scheme, activation=functional.silu)
    state: dict[str, Tensor] = {}
    weights = {}
    for expert in range(_EXPERTS):
        for projection in PROJECTIONS:
            name = f"{expert}.{projection}"
            shape = (_HIDDEN, _INNER) if projection == "down_proj" else (_INNER, _HIDDEN)
            tensors, weights[name] = _make_weight(*shape, scheme, generator)
            state |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    layer.load_state_dict(state)
    calls: list[Call] = []
    for tokens in _TOKENS:
        x = torch.randn(tokens, _HIDDEN, generator=generator).to(torch.bfloat16)
        scores, index = torch.rand(tokens, _EXPERTS, generator=generator).topk(_TOP_K)
        scores = scores.to(torch.bfloat16)
        calls.append(((x, index, scores), _exact_experts(x.double(), index, scores.double(), weights)))
    return layer, calls


def _exact_experts(x: Tensor, index: Tensor, scores: Tensor, weights: dict[str, Tensor]) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(_EXPERTS):
        gate, up, down = (weights[f"{expert}.{projection}"] for projection in PROJECTIONS)
        y = (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        out += y * (scores * (index == expert)).sum(-1, keepdim=True)
    return out


def _make_weight(
    rows: int, columns: int, scheme: Scheme, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors of a random weight, and what they stand for in float64."""
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    tensors = pack(*quantize_rtn(weight, scheme), scheme)
    return tensors, dequantize(tensors, scheme, torch.float64)


def _label(scheme: Scheme) -> str:
    group = f"g{scheme.group_size}"
    packing = scheme.packing_format.rpartition(":")[2].removeprefix("auto_")
    return f"W{scheme.bits} {group} {'sym' if scheme.sym else 'asym'} {'plain' if packing == 'round' else packing}"
