"""One packed model from its files: build on the meta device, swap the packed layers, fill in the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit_runtime.checkpoint import WeightFiles
from quantkit_runtime.config import QuantizationConfig, Scheme
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.format import PACKED_SUFFIXES
from quantkit_runtime.linear import W4A16Linear
from quantkit_runtime.optional import import_optional


def assemble(
    folder: Path,
    build: Callable[[], nn.Module],
    quantization: QuantizationConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compute: str,
    backend: str,
) -> nn.Module:
    """Load a packed model in evaluation mode, without gradients.

    The checkpoint's tensors decide which layers are packed and the configuration must agree; afterwards every
    tensor of the checkpoint has been used and every parameter and buffer of the model has a value.

    Args:
        folder: Holds ``config.json`` and the weights.
        build: Makes the unquantized architecture; called where parameters land on the meta device.
        quantization: The folder's parsed ``quantization_config``.
        device: Where the tensors go.
        dtype: For floating tensors of layers that are not packed, except those the model class keeps in float32.
        compute: See :meth:`W4A16Linear.prepare`.
        backend: See :meth:`W4A16Linear.prepare`.

    Raises:
        CheckpointFormatError: Files, configuration and architecture disagree.
        BackendUnavailableError: The backend cannot serve a layer.
        MissingDependencyError: accelerate is not installed.
    """
    files = WeightFiles(folder)
    with _empty_parameters(), _default_dtype(dtype):
        model = build()
    for name, scheme in _packed_layers(model, files, quantization).items():
        _swap(model, name, scheme, files)
    _fill(model, files, device, dtype)
    model.to(device)  # non-persistent buffers were computed on the CPU
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, W4A16Linear):
            module.prepare(dtype, compute=compute, backend=backend)
    return model


def _packed_layers(model: nn.Module, files: WeightFiles, quantization: QuantizationConfig) -> dict[str, Scheme]:
    config_path = files.folder / "config.json"
    packed = [name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")]
    if not packed:
        raise CheckpointFormatError(
            f"{config_path}: quantization_config: present, but the weights hold no packed layer; quantize the "
            "model again"
        )
    modules = dict(model.named_modules())
    layers = {}
    for name in packed:
        scheme = quantization.scheme_for(name)
        file = files.where(f"{name}.qweight")
        if scheme is None:
            raise CheckpointFormatError(
                f"{config_path}: quantization_config: leaves {name} in 16 bit, but {file} holds it packed; "
                "quantize the model again"
            )
        if type(modules.get(name)) is not nn.Linear:
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise CheckpointFormatError(
                f"{file}: {name}: packed, but {type(model).__name__} has {found} there, not a Linear; the "
                "checkpoint belongs to another architecture or library version"
            )
        layers[name] = scheme
    if quantization.blocks is not None:
        for name, module in modules.items():
            if type(module) is nn.Linear and name not in layers and quantization.scheme_for(name) is not None:
                raise CheckpointFormatError(
                    f"{config_path}: quantization_config: says that {name} is packed, but the weights have no "
                    f"{name}.qweight; quantize the model again"
                )
    return layers


def _swap(model: nn.Module, name: str, scheme: Scheme, files: WeightFiles) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    try:
        layer = W4A16Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            group_size=scheme.group_size,
            bits=scheme.bits,
            sym=scheme.sym,
            packing_format=scheme.packing_format,
            device="meta",
        )
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{files.where(f'{name}.qweight')}: {name}: {error}") from None
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _fill(model: nn.Module, files: WeightFiles, device: torch.device, dtype: torch.dtype) -> None:
    expected = model.state_dict()
    stored_as_is = {
        f"{name}.{suffix}"
        for name, module in model.named_modules()
        if isinstance(module, W4A16Linear)
        for suffix in (*PACKED_SUFFIXES, "bias")
    }
    ignored = _compile_any(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    in_float32 = _float32_names(model, dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in files.read(device):
        if name not in expected:
            if ignored is not None and ignored.search(name):
                continue
            raise CheckpointFormatError(
                f"{files.where(name)}: {name}: has no place in {type(model).__name__}; the checkpoint belongs to "
                "another architecture or library version"
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointFormatError(
                f"{files.where(name)}: {name}: has shape {tuple(tensor.shape)} where {type(model).__name__} needs "
                f"{tuple(expected[name].shape)}; check config.json or quantize the model again"
            )
        if name in stored_as_is:
            if not name.endswith(".bias") and tensor.dtype != expected[name].dtype:
                raise CheckpointFormatError(
                    f"{files.where(name)}: {name}: has dtype {tensor.dtype} where {expected[name].dtype} is "
                    "needed; quantize the model again"
                )
        elif tensor.is_floating_point():
            keep = in_float32 is not None and in_float32.search(name)
            tensor = tensor.to(torch.float32 if keep else dtype)  # noqa: PLW2901 - the cast replaces the tensor
        state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    tie_weights = getattr(model, "tie_weights", None)  # transformers
    if tie_weights is not None:
        tie_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointFormatError(
            f"{files.folder}: {missing[0]}{more}: missing from the weights; download or quantize the model again"
        )


def _float32_names(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names that the model's class keeps in float32; see ``_keep_in_fp32_modules`` in both libraries."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if hasattr(model, "_keep_in_fp32_modules_strict"):  # transformers: the plain list guards float16 only
        if dtype != torch.float16:
            names.clear()
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return _compile_any(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in sorted(names))


def _compile_any(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    return re.compile(joined) if joined else None


def _empty_parameters() -> Any:
    """Context in which new parameters land on the meta device and buffers are really computed."""
    return import_optional("accelerate").init_empty_weights(include_buffers=False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Both libraries build a model under its dtype; buffers computed in the constructor depend on it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def quantization_of(config: Mapping[str, Any], path: Path) -> QuantizationConfig | None:
    """Parse the ``quantization_config`` of a ``config.json``, None if there is none.

    Args:
        config: Content of the file.
        path: The file, for messages.

    Raises:
        CheckpointFormatError: It is not one that this runtime reads.
    """
    found = config.get("quantization_config")
    if found is None:
        for key, value in config.items():
            if isinstance(value, Mapping) and quantization_of(value, path) is not None:
                raise CheckpointFormatError(
                    f"{path}: {key}.quantization_config: only a top-level quantization_config is read"
                )
        return None
    if not isinstance(found, Mapping):
        raise CheckpointFormatError(f"{path}: quantization_config: must be a mapping, not {found!r}")
    try:
        return QuantizationConfig.from_dict(found)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None
