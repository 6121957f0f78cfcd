"""The reference backend: unpack the weight in every call, then the ordinary dense product.

It holds nothing beside the stored tensors, runs on any device that torch supports, and its results are bit for
bit those of a ``torch.nn.Linear`` that holds the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize
from quantkit_runtime.kernels.dispatch import ExpertsKernel, ExpertsSpec, LinearKernel, LinearSpec, register
from quantkit_runtime.kernels.experts_loop import ExpertLoop


class ReferenceKernel:
    """``x @ dequantize(weight).T + bias``, see :class:`quantkit_runtime.kernels.dispatch.LinearKernel`."""

    extra_bytes = 0

    def __init__(self, scheme: Scheme, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._scheme = scheme
        self._tensors = dict(tensors)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = dequantize(self._tensors, self._scheme, x.dtype)
        return functional.linear(x, weight, None if self._bias is None else self._bias.to(x.dtype))


class ReferenceExperts(ExpertLoop):
    """Expert after expert, the weights of those that some token is sent to unpacked in every call."""

    def __init__(self, spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> None:
        super().__init__(spec)
        self._scheme = spec.scheme
        self._stored = {"gate_up": dict(gate_up), "down": dict(down)}

    def product(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Product of each row with the weight of its expert."""
        stored, scheme = self._stored[name], self._scheme
        out: Tensor = torch.ops.quantkit.experts_dequantized(
            x,
            index,
            stored["qweight"],
            stored["qzeros"],
            stored["scales"],
            scheme.bits,
            scheme.group_size,
            scheme.sym,
            scheme.packing_format,
        )
        return out


def _requirement(spec: LinearSpec | ExpertsSpec) -> str | None:
    return None if spec.compute == "16bit" else f"it computes in 16 bit, not in {spec.compute}"


@register("linear", "reference", priority=0, requirement=_requirement)
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel; copies nothing."""
    return ReferenceKernel(spec.scheme, tensors, bias)


@register("experts", "reference", priority=0, requirement=_requirement)
def prepare_experts(spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> ExpertsKernel:
    """Make the kernel; copies nothing."""
    return ReferenceExperts(spec, gate_up, down)
