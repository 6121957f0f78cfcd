"""The CPU backend of Linear layers: spends memory to be as fast as an unquantized layer, and faster on few rows.

Unpacking a weight costs a CPU several times the product itself, so this backend unpacks once, when the layer is
prepared, and keeps a dense copy in the activations' dtype (2 bytes per weight in bf16). Where memory matters
more than speed, ask for the ``reference`` backend, which keeps nothing.

Up to :data:`MAX_INT4_ROWS` rows the product is bound by reading the weight, and torch's int4 operator reads a
quarter of the bytes. ``eval/perf/cpu_linear.py`` measures both; docs/results/cpu.md keeps what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from quantkit_runtime.format import dequantize
from quantkit_runtime.kernels.cpu_int4 import Int4Weight, why_no_int4
from quantkit_runtime.kernels.dispatch import LinearKernel, LinearSpec, register
from quantkit_runtime.kernels.reference import ReferenceKernel

MAX_INT4_ROWS = 8
"""Rows above which the dense product is as fast."""


class CpuKernel:
    """Dense product from an unpacked copy, int4 product for few rows."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._dtype = spec.dtype
        self._in_features = spec.in_features
        self._weight = dequantize(tensors, spec.scheme, spec.dtype)
        self._bias = None if bias is None else bias.to(spec.dtype)
        self._int4: Int4Weight | None = None
        if why_no_int4(spec.in_features, spec.out_features, spec.scheme, spec.dtype) is None:
            self._int4 = Int4Weight.from_packed(tensors, spec.scheme)
        self._other_dtypes = ReferenceKernel(spec.scheme, tensors, bias)
        self.extra_bytes = self._weight.nbytes + (0 if self._int4 is None else self._int4.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if x.dtype != self._dtype:
            return self._other_dtypes(x)
        rows = x.numel() // self._in_features
        if self._int4 is None or not 0 < rows <= MAX_INT4_ROWS:
            return functional.linear(x, self._weight, self._bias)
        out = self._int4.product(x.reshape(rows, self._in_features))
        if self._bias is not None:
            out = out + self._bias
        return out.view(*x.shape[:-1], out.shape[-1])


def _requirement(spec: LinearSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"it needs the weights on the CPU, they are on {spec.device}"
    if spec.compute != "16bit":
        return f"it computes in 16 bit, not in {spec.compute}"
    return None


@register("linear", "cpu", priority=10, requirement=_requirement)
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel; unpacks the weight once."""
    return CpuKernel(spec, tensors, bias)
