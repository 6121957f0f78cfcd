"""Rounding a weight to the nearest codes of a scheme, bit for bit as auto-round does.

Legend: K = in_features, N = out_features, G = number of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import least_zero, packed_tensors

# Smallest magnitude of a scale; auto-round clamps to it so that float16 scales stay invertible.
_SCALE_FLOOR = 1e-5


def quantize_rtn(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to the nearest code, as auto-round does with ``iters=0, disable_opt_rtn=True``.

    The order of operations and the dtype of every intermediate follow auto-round 0.16 (``data_type/int.py``
    ``quant_tensor_rtn_sym`` and ``quant_tensor_asym``, then ``QuantLinear.pack``), so that the packed tensors
    are bit-identical: the group range and the scale are computed in the weight's dtype and then stored as
    float16, and the code is read back from the dequantized weight in the weight's dtype. Only zero points that
    cannot be stored are others, see `storable_grid`.

    Args:
        weight: (N, K) float32, bfloat16 or float16.
        scheme: Target scheme.

    Returns:
        codes (N, K) uint8, scales (G, N) float16, zeros (G, N) int32 or None in a symmetric scheme.

    Raises:
        CheckpointFormatError: The layer's shape does not fit the scheme.
    """
    values = _group(weight, scheme)
    scale, zero = _fit_grid(values, weight.dtype, scheme)
    step, offset = (tensor.unsqueeze(-1).to(values.dtype) for tensor in (scale, zero))
    levels = torch.div(values, step).round_().add_(offset).clamp_(0, scheme.max_code)
    if not scheme.sym:  # a symmetric code is near enough to its zero point to come back as it was
        restored = levels.sub_(offset).mul_(step).to(weight.dtype)
        levels = restored.to(values.dtype).div_(step).add_(offset).round_().clamp_(0, scheme.max_code)
    codes = levels.to(torch.int16).to(torch.uint8)  # six times faster than in one step
    return codes.view(weight.shape), *_by_group(scale, zero, len(weight), scheme)


def rtn_grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return only the scales and zeros of :func:`quantize_rtn`."""
    scale, zero = _fit_grid(_group(weight, scheme), weight.dtype, scheme)
    return _by_group(scale, zero, len(weight), scheme)


def _group(weight: Tensor, scheme: Scheme) -> Tensor:
    """Groups of a weight (N, K) as (N * G, length), in the dtype that auto-round's own promotion computes in."""
    out_features, in_features = weight.shape
    packed_tensors(in_features, out_features, scheme)
    groups = weight.reshape(-1, scheme.group_length(in_features))
    return groups.to(torch.promote_types(weight.dtype, torch.float16))  # bfloat16 becomes float32


def _fit_grid(values: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale (float16) and zero point of each group; ``dtype`` is the weight's own."""
    low = values.amin(-1).clamp_(max=0).to(dtype)
    high = values.amax(-1).clamp_(min=0).to(dtype)
    if not scheme.sym:
        scale = ((high - low) / scheme.max_code).to(torch.float16).clamp(min=_SCALE_FLOOR)
        return storable_grid(scale, torch.round(-low / scale), scheme)
    magnitude = -low
    # The code range is [-2**(b-1), 2**(b-1) - 1]: give the longer side of the range the extra code by the sign of
    # the scale.
    signed = (2 * (high < magnitude).int() - 1) * torch.maximum(high, magnitude)
    scale = (signed / scheme.midpoint).to(torch.float16)
    scale = torch.where(scale < 0, scale.clamp(max=-_SCALE_FLOOR), scale.clamp(min=_SCALE_FLOOR))
    return scale, torch.full_like(scale, scheme.midpoint)


def storable_grid(scale: Tensor, zero: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scales and zero points that packing can store.

    The gptq packing has no zero point of 0, which groups without negative weights want; auto-round stores 1 instead
    and so moves all weights of such a group by a step. Here they get 1 and a step that reaches as far with one code
    less.

    Args:
        scale: Of each group, float16.
        zero: Zero points of an asymmetric scheme, of the same shape, whole numbers of any dtype.
        scheme: How they are stored.
    """
    least = least_zero(scheme)
    wider = (scale.float() * (scheme.max_code / (scheme.max_code - least))).to(scale.dtype)
    return torch.where(zero < least, wider, scale), zero.clamp(min=least)


def _by_group(scale: Tensor, zero: Tensor, rows: int, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros (N * G,) as (G, N), as they are stored; no zeros in a symmetric scheme."""
    zeros = None if scheme.sym else zero.view(rows, -1).t().to(torch.int32).contiguous()
    return scale.view(rows, -1).t().contiguous(), zeros
