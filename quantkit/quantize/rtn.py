"""Round to nearest, one layer at a time, straight from the source's files; bit-identical to auto-round's RTN."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantkit.checkpoint import Component
from quantkit.quantize.plan import PlannedLayer

if TYPE_CHECKING:
    from torch import Tensor

# Given a planned layer, returns its tensors by full name.
Pack = Callable[[PlannedLayer], dict[str, "Tensor"]]


def round_to_nearest(component: Component) -> Pack:
    """Return a function that packs a layer of this component by rounding its weight to nearest."""
    from quantkit.quantize.tensors import read_tensor
    from quantkit_runtime.format import pack, quantize_rtn

    def pack_layer(layer: PlannedLayer) -> dict[str, Tensor]:
        weight = read_tensor(component.tensors[f"{layer.name}.weight"])
        packed = pack(*quantize_rtn(weight, layer.scheme), layer.scheme)
        return {f"{layer.name}.{suffix}": tensor for suffix, tensor in packed.items()}

    return pack_layer
