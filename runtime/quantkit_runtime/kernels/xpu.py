"""The XPU backend: torch's int4 operator, which is oneDNN's product with a compressed weight, for few rows.

``aten::_weight_int4pack_mm_with_scales_and_zeros(x, weight, group, scales, zeros)`` computes
``x @ (scale * (code - zero)).T`` on Intel GPUs:

========  ============  ===========  ===================================================
argument  dtype         shape        content
========  ============  ===========  ===================================================
x         bf16 or fp16  (M, K)       contiguous, on the current device
weight    int32         (N, K / 8)   contiguous, 8 codes a word along K, lowest bits first
group     int           a scalar     group length, a multiple of 32
scales    as x          (K / g, N)   contiguous
zeros     int8          (K / g, N)   contiguous
========  ============  ===========  ===================================================

So the checkpoint's words are transposed (gptq and plain packing) or packed anew (awq), and kept beside it: half a
byte per weight. Therefore the Triton backend, which keeps nothing, comes first; this one is for an XPU without
triton, or by name. Above :data:`MAX_INT4_ROWS` rows the next best backend runs; where the better border is has
not been measured.

Source: torch 2.14, ``aten/src/ATen/native/mkldnn/xpu`` (``Blas.cpp`` checks, ``detail/WoQMatmul.cpp`` strides).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit_runtime.bitstream import pack_words
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import unpack
from quantkit_runtime.kernels.dispatch import LinearKernel, LinearSpec, backends, register

NAME = "xpu-int4"
MAX_INT4_ROWS = 32
_OPERATOR = "aten::_weight_int4pack_mm_with_scales_and_zeros"
_DTYPES = (torch.bfloat16, torch.float16)
_GROUP_STEP = 32


class XpuInt4Kernel:
    """int4 product for few rows, another backend's kernel for many and for other dtypes."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._dtype = spec.dtype
        self._in_features = spec.in_features
        self._group_length = spec.scheme.group_length(spec.in_features)
        self._codes, self._scales, self._zeros = repack(tensors, spec.scheme, spec.dtype)
        self._bias = None if bias is None else bias.to(spec.dtype)
        self._many_rows = _next_best(spec, tensors, bias)
        kept = (tensor for tensor in (self._codes, self._scales, self._zeros) if tensor is not tensors["scales"])
        self.extra_bytes = sum(tensor.nbytes for tensor in kept) + self._many_rows.extra_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        rows = x.numel() // self._in_features
        if x.dtype != self._dtype or not 0 < rows <= MAX_INT4_ROWS:
            return self._many_rows(x)
        flat = x.reshape(rows, self._in_features).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
            flat, self._codes, self._group_length, self._scales, self._zeros
        )
        if self._bias is not None:
            out = out + self._bias
        return out.view(*x.shape[:-1], out.shape[-1])


def repack(tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's codes, scales and zero points as the operator takes them.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales``.
        scheme: How they are stored; 4 bits.
        dtype: Of the activations.

    Returns:
        codes (N, K / 8) int32, scales (G, N) in ``dtype``, zeros (G, N) int8.
    """
    codes, _, zeros = unpack(tensors, scheme)
    scales = tensors["scales"].to(dtype).contiguous()
    return pack_words(codes, scheme.bits).contiguous(), scales, zeros.to(torch.int8)


def _next_best(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    others = (backend for backend in backends("linear") if backend.name != NAME and backend.layout == "stored")
    chosen = next(backend for backend in others if backend.requirement(spec) is None)
    kernel: LinearKernel = chosen.prepare(spec, tensors, bias)
    return kernel


def _requirement(spec: LinearSpec) -> str | None:
    device, scheme = spec.device, spec.scheme
    if device.type != "xpu":
        return f"it needs the weights on an XPU, they are on {device}"
    if spec.compute != "16bit":
        return f"it computes in 16 bit, not in {spec.compute}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "XPU"):
        return f"torch {torch.__version__} has no {_OPERATOR.removeprefix('aten::')} for XPU"
    if spec.dtype not in _DTYPES:
        return f"it computes in bfloat16 or float16, not in {str(spec.dtype).removeprefix('torch.')}"
    if scheme.bits != 4:
        return f"it reads 4-bit weights, not {scheme.bits}-bit ones"
    length = scheme.group_length(spec.in_features)
    if length % _GROUP_STEP:
        return f"it needs groups of a multiple of {_GROUP_STEP} features, not of {length}"
    if device.index is not None and device.index != torch.accelerator.current_device_index():
        return (
            "its operator runs on the current device alone; call "
            f"torch.accelerator.set_device_index({device.index}) before loading"
        )
    return None


@register("linear", NAME, priority=15, requirement=_requirement)
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel; repacks the weight."""
    return XpuInt4Kernel(spec, tensors, bias)
