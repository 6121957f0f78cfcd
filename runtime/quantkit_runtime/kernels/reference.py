"""The reference backend: unpack the weight in every call, then the ordinary dense product.

It holds nothing beside the stored tensors, runs on any device that torch supports, and its results are bit for
bit those of a ``torch.nn.Linear`` that holds the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize
from quantkit_runtime.kernels.dispatch import LinearKernel, LinearSpec, register


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


def _requirement(spec: LinearSpec) -> str | None:
    return None if spec.compute == "16bit" else f"it computes in 16 bit, not in {spec.compute}"


@register("linear", "reference", priority=0, requirement=_requirement)
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel; copies nothing."""
    return ReferenceKernel(spec.scheme, tensors, bias)
