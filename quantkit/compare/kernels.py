"""Whether there are kernels for a model's packed layers, told before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint import ModelFolder
from quantkit.errors import CheckpointError, RecipeError
from quantkit_runtime.config import QuantizationConfig
from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError

if TYPE_CHECKING:
    import torch


def check_kernels(
    model: ModelFolder, device: torch.device, dtype: torch.dtype, *, compute: str, backend: str
) -> None:
    """Refuse a quantized model for whose Linears there is no kernel here, without reading a weight.

    Loading would refuse it as well, but a candidate is loaded only after its reference has made everything.

    Args:
        model: Quantized or not.
        device: Where it is to run.
        dtype: Of the activations.
        compute: How packed layers compute.
        backend: Kernel backend, or ``auto``.

    Raises:
        RecipeError: With the reason of every backend that was asked.
        CheckpointError: If the model's metadata or headers cannot be read.
    """
    from quantkit_runtime.kernels import LinearSpec, resolve, resolve_compute

    specs = set()
    for component in model.components.values():
        component.check_described()
        if component.quantization is None:
            continue
        try:
            config = QuantizationConfig.from_dict(component.quantization)
        except CheckpointFormatError as error:
            raise CheckpointError(f"{component.folder / 'config.json'}: {error}") from error
        for name, info in component.tensors.items():
            layer, _, suffix = name.rpartition(".")
            # Experts of a layer are packed together, for kernels of their own.
            if suffix != "qweight" or ".experts." in layer or (scheme := config.scheme_for(layer)) is None:
                continue
            in_features, out_features = info.shape[0] * 32 // scheme.bits, info.shape[1]
            specs.add(LinearSpec(in_features, out_features, scheme, device, dtype, resolve_compute(compute)))
    try:
        for spec in specs:
            resolve("linear", spec, backend)
    except BackendUnavailableError as error:
        raise RecipeError(str(error)) from error
