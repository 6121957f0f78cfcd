"""Round to nearest, straight from the source's files in blocks of rows; bit-identical to auto-round's RTN."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantkit.checkpoint import Component
from quantkit.quantize.plan import PlannedLayer
from quantkit.quantize.tensors import check_finite, read_rows

if TYPE_CHECKING:
    from torch import Tensor

# Given a planned layer, returns its tensors by full name; called from several threads at once.
Pack = Callable[[PlannedLayer], dict[str, "Tensor"]]


def round_to_nearest(component: Component) -> Pack:
    """Return a function that packs a layer of this component by rounding its weight to nearest.

    The function raises CheckpointError if the weight holds NaN or infinity.
    """
    import torch

    from quantkit_runtime.format import PACKED_SUFFIXES, pack
    from quantkit_runtime.rounding import quantize_rtn

    def pack_layer(layer: PlannedLayer) -> dict[str, Tensor]:
        info = component.tensors[f"{layer.name}.weight"]
        blocks = []
        for _, weight in read_rows(info):
            codes, scales, zeros = quantize_rtn(weight, layer.scheme)
            if not torch.isfinite(scales).all():  # as the scales of such a weight never are
                check_finite(info, weight)
            blocks.append(pack(codes, scales, zeros, layer.scheme))
        # Output features are the second axis of all three, in every packing.
        packed = {suffix: torch.cat([block[suffix] for block in blocks], 1) for suffix in PACKED_SUFFIXES}
        return {f"{layer.name}.{suffix}": tensor for suffix, tensor in packed.items()}

    return pack_layer
