"""Checking what is in the packed tensors of a layer: by themselves, and against the weight that they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.checkpoint import Component
from quantkit.quantize.plan import PlannedLayer
from quantkit.quantize.tensors import read_rows, read_tensor
from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit_runtime.config import Scheme

# Signed gradient descent moves a rounding by less than one code; fp16 scales and bf16 weights add a little.
_CODE_SLACK = 0.05
# A tuned layer may be farther from its source than round-to-nearest (it fits outputs, not weights), a scrambled
# one is many times farther.
_MAX_ERROR_RATIO = 2.0
# With room for the rounding of float32.
_HALF_STEP = 0.5001


@dataclass(frozen=True)
class LayerError:
    """How far a packed layer is from its source weight W.

    Attributes:
        component: E.g. ``transformer``.
        name: Of the layer.
        relative_l2: ||dequantized - W|| / ||W||.
        rtn_relative_l2: The same for round-to-nearest with the same scheme.
    """

    component: str
    name: str
    relative_l2: float
    rtn_relative_l2: float


def check_layer(
    component: Component, layer: PlannedLayer, source: TensorInfo | None
) -> tuple[LayerError | None, str | None]:
    """Read a layer's packed tensors back and check them.

    Args:
        component: Holds the tensors, in the shapes and dtypes of the layer's scheme.
        layer: Which.
        source: The weight (N, K) that was quantized; None checks the packed tensors by themselves.

    Returns:
        The distance from the source, if there is one; what is wrong, if anything is.
    """
    import torch

    from quantkit_runtime.format import least_zero, unpack_zeros

    tensors = {name.rpartition(".")[2]: read_tensor(component.tensors[name]) for name in layer.tensors}
    if not torch.isfinite(tensors["scales"]).all() or (tensors["scales"] == 0).any():
        return None, "scales: hold zero, NaN or infinity"
    if layer.scheme.sym and (unpack_zeros(tensors["qzeros"], layer.scheme) != layer.scheme.midpoint).any():
        return None, "qzeros: are not those of a symmetric scheme"
    if source is None:
        return None, None
    relative_l2, rtn_relative_l2, steps = _measure(tensors, layer.scheme, source)
    problem = None
    # Tuned groups whose zero point cannot be stored are rounded a second time.
    most = 1.5 if not layer.scheme.sym and least_zero(layer.scheme) else 1
    if not steps <= most + _CODE_SLACK:
        problem = f"a weight is {steps:.2f} codes away from its source; at most {most} is possible"
    elif not relative_l2 <= _MAX_ERROR_RATIO * rtn_relative_l2 + 1e-3:
        problem = (
            f"relative error {relative_l2:.3f} against {rtn_relative_l2:.3f} of rounding to nearest; "
            "its scales do not belong to this weight"
        )
    return LayerError(component.name, layer.name, relative_l2, rtn_relative_l2), problem


def _measure(tensors: dict[str, Tensor], scheme: Scheme, source: TensorInfo) -> tuple[float, float, float]:
    """Return the relative error, that of rounding to nearest, and the most codes that a weight is away."""
    import torch

    from quantkit_runtime.format import pack, unpack
    from quantkit_runtime.rounding import quantize_rtn, rtn_grid

    norm = squares = rtn_squares = most_steps = 0.0
    for rows, weight in read_rows(source):
        codes, scales, zeros = unpack(tensors, scheme, rows)
        square, steps = _compare(weight, codes, scales, zeros, scheme)
        rtn_scales, rtn_zeros = rtn_grid(weight, scheme)
        same_grid = torch.equal(scales, rtn_scales) and (rtn_zeros is None or torch.equal(zeros, rtn_zeros))
        if same_grid and steps <= _HALF_STEP:  # then these are the codes of rounding to nearest
            rtn_squares += square
        else:
            rounded = pack(*quantize_rtn(weight, scheme), scheme)
            rtn_squares += _compare(weight, *unpack(rounded, scheme), scheme)[0]
        squares += square
        norm += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
        most_steps = max(most_steps, steps)
    scale = 1 / max(math.sqrt(norm), 1e-30)
    return math.sqrt(squares) * scale, math.sqrt(rtn_squares) * scale, most_steps


def _compare(weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> tuple[float, float]:
    """Return ||dequantized - weight||^2 of some rows, and the most codes that a weight is away."""
    import torch

    scale = scales.t().reshape(-1, 1).float()
    zero = zeros.t().reshape(-1, 1).float()
    place = weight.reshape(len(scale), -1).to(torch.float32, copy=True).div_(scale).add_(zero)
    code = codes.view_as(place).float()
    missed = torch.linalg.vector_norm(place - code, dim=-1, keepdim=True).mul_(scale)
    # A weight beyond the last code is at its place there.
    low, high = torch.aminmax(place.clamp_(0, scheme.max_code).sub_(code))
    return float(torch.linalg.vector_norm(missed)) ** 2, max(-float(low), float(high))
