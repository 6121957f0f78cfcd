"""From a tuned layer to the tensors of the checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantizationError
from quantkit.quantize.plan import PACKING_FORMAT
from quantkit.quantize.tuning import Layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit_runtime.config import Scheme


def pack_layers(model: torch.nn.Module, layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    """Yield the packed tensors of every tuned layer, by full name, on the CPU.

    Where packing cannot keep the very weight that auto-round tuned, the weight comes beside it: groups with a zero
    point of 0, which cannot be stored, are rounded to another grid.

    Args:
        model: Holds the layers as auto-round leaves them: weight (N, K), ``scale`` (N, G) and ``zp``.
        layers: By name; those of 16 bits yield nothing.

    Raises:
        QuantizationError: If a layer was tuned that should not be, or the other way round.
    """
    import torch

    from quantkit_runtime.format import dequantize, pack
    from quantkit_runtime.rounding import storable_grid

    for name, layer in layers.items():
        module: Any = model.get_submodule(name)
        scale = getattr(module, "scale", None)
        if (scale is None) != (layer.bits == 16):
            raise QuantizationError(f"{name} was {'not ' if scale is None else ''}tuned, against the plan")
        if scale is None:
            continue
        scheme = _scheme(layer)
        weight = module.weight.detach().cpu()
        rows = weight.shape[0]
        scales = scale.detach().cpu().reshape(rows, -1).to(torch.float16)
        zero = module.zp
        zeros = zero.detach().cpu().reshape(rows, -1).float() if isinstance(zero, torch.Tensor) else float(zero)
        if isinstance(zeros, torch.Tensor):
            scales, zeros = storable_grid(scales, zeros, scheme)
        # The tuned weight is scale * (code - zero), rounded to the model's dtype: dividing gives the code back.
        levels = weight.float().view(rows, scales.shape[1], -1) / scales.float().unsqueeze(-1)
        offsets = zeros.unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
        codes = (levels + offsets).round().clamp(0, scheme.max_code).to(torch.uint8).view_as(weight)
        stored = zeros.t().to(torch.int32).contiguous() if isinstance(zeros, torch.Tensor) else None
        packed = pack(codes, scales.t().contiguous(), stored, scheme)
        for suffix, tensor in packed.items():
            yield f"{name}.{suffix}", tensor
        if not torch.equal(dequantize(packed, scheme, weight.dtype), weight):
            yield f"{name}.weight", weight.clone()


def unpack_layers(model: torch.nn.Module, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    """Give layers the weights that `pack_layers` packed, as auto-round had left them.

    Args:
        model: Holds the layers with their weights from before tuning.
        layers: By name; those of 16 bits are left alone.
        tensors: From `pack_layers`.
    """
    from quantkit_runtime.format import PACKED_SUFFIXES, dequantize

    for name, layer in layers.items():
        if layer.bits == 16:
            continue
        module: Any = model.get_submodule(name)
        weight = module.weight.data
        tuned = tensors.get(f"{name}.weight")
        if tuned is None:
            packed = {suffix: tensors[f"{name}.{suffix}"] for suffix in PACKED_SUFFIXES}
            tuned = dequantize(packed, _scheme(layer), weight.dtype)
        weight.copy_(tuned)


def _scheme(layer: Layer) -> Scheme:
    from quantkit_runtime.config import Scheme

    return Scheme(layer.bits, layer.group_size, layer.sym, packing_format=PACKING_FORMAT)
