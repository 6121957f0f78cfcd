"""The CPU backend: spends memory to be as fast as an unquantized layer, and faster on few rows.

Unpacking a weight costs a CPU several times the product itself, so this backend unpacks once, when the layer is
prepared, and keeps a dense copy in the activations' dtype (2 bytes per weight in bf16). Where memory matters
more than speed, ask for the ``reference`` backend, which keeps nothing.

Up to :data:`MAX_INT4_ROWS` rows the product is bound by reading the weight, and torch's int4 operator reads a
quarter of the bytes. It exists in a fast form for bf16 only, and there rounds the group scales to bf16: a
relative weight error of at most 2 ** -9, the same bound as for a weight that is rounded to bf16 as a whole.
Against a float64 product its error is that of the dense path (2.4e-3 of the output's norm, both, at K = 256 and
3072 with random float16 scales).

Median times in one process, 2 threads, AVX-512 with bf16, torch 2.14, dense bf16 against int4, in ms:

======  ================  =================
rows    256 x 1024        3072 x 3072
======  ================  =================
1       0.022 / 0.006     0.406 / 0.127
4       0.023 / 0.010     0.414 / 0.231
8       0.025 / 0.016     0.525 / 0.463
64      0.056 / 0.105     1.83 / 4.28
512     0.298 / 0.813     11.0 / 30.0
======  ================  =================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.format import dequantize, unpack
from quantkit_runtime.kernels.dispatch import LinearKernel, LinearSpec, register
from quantkit_runtime.kernels.reference import ReferenceKernel

MAX_INT4_ROWS = 4
_INT4_GROUP_LENGTHS = (32, 64, 128, 256)
_INT4_OUT_STEP = 16
_INT4_INNER_TILES = 1  # ignored by the CPU packing, whose signature is shared with the CUDA one


class CpuKernel:
    """Dense product from an unpacked copy, int4 product for few rows."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._dtype = spec.dtype
        self._in_features = spec.in_features
        self._weight = dequantize(tensors, spec.scheme, spec.dtype)
        self._bias = None if bias is None else bias.to(spec.dtype)
        self._group_length = spec.scheme.group_length(spec.in_features)
        self._int4: tuple[Tensor, Tensor] | None = None
        if _fits_int4(spec):
            codes, scales, _ = unpack(tensors, spec.scheme)
            scale = scales.to(torch.bfloat16)
            self._int4 = (
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), _INT4_INNER_TILES),
                torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous(),
            )
        self._other_dtypes = ReferenceKernel(spec.scheme, tensors, bias)
        self.extra_bytes = sum(tensor.nbytes for tensor in (self._weight, *(self._int4 or ())))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if x.dtype != self._dtype:
            return self._other_dtypes(x)
        rows = x.numel() // self._in_features
        if self._int4 is None or not 0 < rows <= MAX_INT4_ROWS:
            return functional.linear(x, self._weight, self._bias)
        codes, scales = self._int4
        flat = x.reshape(rows, self._in_features).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, self._group_length, scales)
        if self._bias is not None:
            out = out + self._bias
        return out.view(*x.shape[:-1], out.shape[-1])


def _fits_int4(spec: LinearSpec) -> bool:
    scheme = spec.scheme
    return (
        spec.dtype == torch.bfloat16
        and scheme.bits == 4
        # The operator wants scale * (8 - zero) in bf16; rounding that term would cost accuracy.
        and scheme.sym
        and scheme.group_length(spec.in_features) in _INT4_GROUP_LENGTHS
        and spec.out_features % _INT4_OUT_STEP == 0
    )


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
