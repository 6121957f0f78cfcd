"""Models of published size with random weights, made on the device layer by layer, in 16 bit or packed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit_runtime import W4A16Linear
from quantkit_runtime.packed import PackedLayer

_ZERO_POINTS = 0x77777777  # gptq stores zero - 1: eight times 8, the middle of 16 codes
_SPREAD = 0.5  # of weights, in 1 / sqrt(K); that of random codes times 1 / (8 sqrt(K)) is about the same


def fill_packed(layer: PackedLayer, generator: torch.Generator) -> None:
    """Give a packed 4-bit gptq layer random codes, the symmetric zero point and scales around 1 / (8 sqrt(K))."""
    for name, buffer in layer.named_buffers():
        if name.endswith("qweight"):
            buffer.view(torch.uint8).random_(0, 256, generator=generator)
        elif name.endswith("qzeros"):
            buffer.fill_(_ZERO_POINTS)
        elif name.endswith("scales"):
            in_features = 8 * layer.get_buffer(f"{name.removesuffix('scales')}qweight").shape[-2]
            typical = 1 / (8 * math.sqrt(in_features))
            buffer.uniform_(0.5 * typical, 1.5 * typical, generator=generator)
        else:
            buffer.normal_(std=0.02, generator=generator)


def fill(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    replace: Callable[[str, nn.Module], PackedLayer | None] = lambda _name, _module: None,
) -> None:
    """Give every parameter of a model on the meta device a tensor, packed layers in the place of some modules.

    At no time is a layer held both packed and unpacked.

    Args:
        model: Its buffers must not be on the meta device; its class says what stays in float32.
        device: Where the tensors go.
        dtype: Of the parameters.
        generator: Random numbers, on the device.
        replace: Returns what takes a module's place, filled and prepared, or None.
    """
    kept_names = "_keep_in_fp32_modules"
    if hasattr(model, f"{kept_names}_strict"):  # transformers, where the plain list guards float16 alone
        kept_names += "_strict"
    in_float32 = getattr(model, kept_names, None) or ()
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        packed = replace(name, module) if name else None
        if packed is not None:
            setattr(model.get_submodule(parent), attribute, packed)
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}"
            kept = any(re.search(rf"(?:^|\.){re.escape(part)}(?:\.|$)", full) for part in in_float32)
            tensor = torch.empty(parameter.shape, dtype=torch.float32 if kept else dtype, device=device)
            _randomize(tensor, key, generator)
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"still without storage: {left[:3]}"
    model.eval()


def _randomize(tensor: Tensor, key: str, generator: torch.Generator) -> None:
    if key == "bias":
        tensor.normal_(std=0.02, generator=generator)
    elif tensor.dim() == 1:
        tensor.fill_(1)  # the scale of a norm
    else:
        tensor.normal_(std=_SPREAD / math.sqrt(tensor[0].numel()), generator=generator)


def packed_linear(
    linear: nn.Linear,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    compute: str,
    backend: str,
) -> W4A16Linear:
    """Return a packed layer of the shape of a Linear, random and prepared.

    Raises:
        BackendUnavailableError: The compute mode or backend cannot run here.
    """
    layer = W4A16Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=device)
    fill_packed(layer, generator)
    layer.prepare(dtype, compute=compute, backend=backend)
    return layer


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers and of what kernels keep beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    extra = sum(layer.extra_bytes for layer in module.modules() if isinstance(layer, PackedLayer))
    return sum(tensor.nbytes for tensor in tensors) + extra
