"""Packed layers in the place of those that a model was built with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit_runtime.checkpoint import WeightFiles
from quantkit_runtime.config import QuantizationConfig, Scheme
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.experts import PROJECTIONS, W4A16Experts
from quantkit_runtime.format import PACKED_SUFFIXES
from quantkit_runtime.linear import W4A16Linear
from quantkit_runtime.names import CheckpointNames


def swap_packed(
    model: nn.Module,
    files: WeightFiles,
    names: CheckpointNames,
    quantization: QuantizationConfig,
    device: torch.device,
) -> dict[str, str]:
    """Put packed layers, still empty, where the checkpoint holds them packed.

    The checkpoint's tensors decide which layers those are, and the configuration must agree.

    Args:
        model: The unquantized architecture.
        files: The checkpoint.
        names: Of the checkpoint's tensors in the model.
        quantization: The parsed ``quantization_config``.
        device: Where stacks of experts are made, to be filled in place; other tensors stay on the meta device.

    Returns:
        Name in the checkpoint -> name in the model of every packed tensor.

    Raises:
        CheckpointFormatError: Files, configuration and architecture disagree.
    """
    modules = dict(model.named_modules())
    targets: dict[str, str] = {}
    experts: dict[str, dict[str, Scheme]] = defaultdict(dict)
    for layer, scheme in packed_layers(files, quantization).items():
        home = names.module(layer)
        targets |= {f"{layer}.{suffix}": f"{home}.{suffix}" for suffix in PACKED_SUFFIXES}
        if names.place(f"{layer}.weight").pattern is not None:
            fused, expert, projection = home.rsplit(".", 2)
            experts[fused][f"{expert}.{projection}"] = scheme
            continue
        if type(modules.get(home)) is not nn.Linear:
            found = type(modules[home]).__name__ if home in modules else "nothing"
            raise CheckpointFormatError(
                f"{files.where(f'{layer}.qweight')}: {layer}: packed, but {type(model).__name__} has {found} "
                "there, not a Linear; the checkpoint belongs to another architecture or library version"
            )
        with _naming(files.where(f"{layer}.qweight"), layer):
            _replace(model, home, _packed_linear(modules[home], scheme))
    for home, schemes in experts.items():
        with _naming(files.folder / "config.json", home):
            _replace(model, home, _packed_experts(modules.get(home), schemes, device))
    if quantization.blocks is not None:
        _check_claims(modules, files, names, quantization, targets)
    return targets


def packed_layers(files: WeightFiles, quantization: QuantizationConfig) -> dict[str, Scheme]:
    """Return the scheme of every layer that the weights hold packed, by its name in the checkpoint."""
    config_path = files.folder / "config.json"
    packed = [name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")]
    if not packed:
        raise CheckpointFormatError(
            f"{config_path}: quantization_config: present, but the weights hold no packed layer; quantize the "
            "model again"
        )
    layers = {}
    for name in packed:
        scheme = quantization.scheme_for(name)
        if scheme is None:
            raise CheckpointFormatError(
                f"{config_path}: quantization_config: leaves {name} in 16 bit, but "
                f"{files.where(f'{name}.qweight')} holds it packed; quantize the model again"
            )
        layers[name] = scheme
    return layers


def _check_claims(
    modules: Mapping[str, nn.Module],
    files: WeightFiles,
    names: CheckpointNames,
    quantization: QuantizationConfig,
    targets: Mapping[str, str],
) -> None:
    """Refuse a configuration that calls a layer packed which is not."""
    for tensor in files.tensors:
        layer = tensor.removesuffix(".weight")
        if layer == tensor or f"{layer}.qweight" in targets or quantization.scheme_for(layer) is None:
            continue
        place = names.place(tensor)
        if place.pattern is not None or type(modules.get(place.name.removesuffix(".weight"))) is nn.Linear:
            raise CheckpointFormatError(
                f"{files.folder / 'config.json'}: quantization_config: says that {layer} is packed, but the "
                f"weights have no {layer}.qweight; quantize the model again"
            )


@contextmanager
def _naming(path: Path, layer: str) -> Iterator[None]:
    """Say in which file and layer something does not fit."""
    try:
        yield
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {layer}: {error}") from None


def _packed_linear(linear: nn.Module, scheme: Scheme) -> W4A16Linear:
    assert isinstance(linear, nn.Linear)
    return W4A16Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        group_size=scheme.group_size,
        bits=scheme.bits,
        sym=scheme.sym,
        packing_format=scheme.packing_format,
        device="meta",
    )


def _packed_experts(fused: Any, schemes: Mapping[str, Scheme], device: torch.device) -> W4A16Experts:
    """Make what replaces transformers' module of fused experts.

    Args:
        fused: That module, with ``gate_up_proj`` (E, 2 I, H), ``down_proj`` (E, H, I) and ``act_fn``.
        schemes: Scheme of each packed Linear, by ``<expert>.<projection>``.
        device: Where the packed tensors go; they are stacked there one by one, none is held twice.
    """
    gate_up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and hasattr(fused, "act_fn")):
        raise CheckpointFormatError(f"packed, but {type(fused).__name__} is no module of fused experts")
    count, hidden_size, intermediate_size = down.shape
    if gate_up.shape != (count, 2 * intermediate_size, hidden_size):
        raise CheckpointFormatError(f"packed, but {type(fused).__name__} lays its experts out in another way")
    expected = {f"{expert}.{projection}" for expert in range(count) for projection in PROJECTIONS}
    if schemes.keys() != expected or len(set(schemes.values())) != 1:
        raise CheckpointFormatError(
            "the experts of a layer are stored in several ways; quantize all of them alike, or none"
        )
    return W4A16Experts(
        count,
        hidden_size,
        intermediate_size,
        scheme=next(iter(schemes.values())),
        activation=fused.act_fn,
        device=device,
    )


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
