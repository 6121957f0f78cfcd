"""torch's int4 product on the CPU, and its layout of a weight.

The operator computes ``x @ (scale * (code - 8) + offset).T`` with one bf16 scale and one bf16 offset per group and
output feature, accumulating in float32. A zero point becomes the offset ``scale * (8 - zero)``, rounded to bf16; in
a symmetric scheme it is 0. Its fast form exists for bf16 alone.

What is rounded: the scale and the offset, each by a relative 2 ** -9 at most, while the weight itself is not.
Against a float64 product the error is that of a dense bf16 product where neither activations nor weights have a
mean (2.3e-3 of the output's norm, both). The rounding of an offset is common to a whole group, so it adds up where
all have one sign: up to 4.6e-3 was seen. int4 itself costs some 1e-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import unpack

_GROUP_LENGTHS = (256, 128, 64, 32)
_OUT_STEP = 16
_ROWS_AT_ONCE = 256  # a multiple of every processor's block; as int32 about what a cache holds
_INNER_TILES = 1  # ignored by the CPU's packing, whose signature is shared with the CUDA one


def why_no_int4(in_features: int, out_features: int, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Reason why the operator cannot serve a layer, or None if it can."""
    if dtype != torch.bfloat16:
        return f"torch's int4 operator is fast in bfloat16 only, not in {str(dtype).removeprefix('torch.')}"
    if scheme.bits != 4:
        return f"torch's int4 operator reads 4-bit weights, not {scheme.bits}-bit ones"
    length = scheme.group_length(in_features)
    if length % _GROUP_LENGTHS[-1]:
        return f"torch's int4 operator needs groups of a multiple of {_GROUP_LENGTHS[-1]} features, not of {length}"
    if out_features % _OUT_STEP:
        return f"torch's int4 operator needs a multiple of {_OUT_STEP} output features, not {out_features}"
    return None


@dataclass(frozen=True)
class Int4Weight:
    """A weight (N, K), or a stack of them, as the operator takes it.

    Attributes:
        codes: (..., N, K / 2) uint8, in an order that depends on the processor.
        scales: (..., G, N, 2) bf16, scale and offset.
        group_length: Of the operator's groups, which may be shorter than those of the scheme.
    """

    codes: Tensor
    scales: Tensor
    group_length: int

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], scheme: Scheme) -> Self:
        """Repack one layer's stored tensors, which `why_no_int4` accepts."""
        codes, scales, zeros = unpack(tensors, scheme)
        length = scheme.group_length(codes.shape[1])
        group_length = next(size for size in _GROUP_LENGTHS if length % size == 0)
        scale = scales.to(torch.bfloat16)
        offset = (scale.float() * (scheme.midpoint - zeros)).to(torch.bfloat16)
        both = torch.stack([scale, offset], dim=-1).repeat_interleave(length // group_length, dim=0)
        packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
        for start in range(0, len(codes), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            packed[rows] = _pack(codes[rows])
        return cls(packed, both.contiguous(), group_length)

    @classmethod
    def stack(cls, weights: list[Self]) -> Self:
        """Stack weights of one shape."""
        codes = torch.stack([weight.codes for weight in weights])
        scales = torch.stack([weight.scales for weight in weights])
        return cls(codes, scales, weights[0].group_length)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.codes.nbytes + self.scales.nbytes

    def product(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` in bf16, of x (M, K) bf16, M > 0."""
        return int4_product(x, self.codes, self.scales, self.group_length)


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), _INNER_TILES)
    return packed


def int4_product(x: Tensor, codes: Tensor, scales: Tensor, group_length: int) -> Tensor:
    """Return ``x @ weight.T`` of x (M, K) bf16, M > 0, and one weight as in `Int4Weight`."""
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group_length, scales)
    return out
