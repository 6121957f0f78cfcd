"""Checking a checkpoint tensor by tensor: against its own metadata, its plan and its source.

What is checked:

1. every component of ``model_index.json`` is there, its index complete, its files whole;
2. every layer that ``quantization_config`` calls packed is packed, with the shapes and dtypes of its scheme, finite
   scales and the zero points of a symmetric scheme; nothing else is packed; no 16-bit weight stands beside a packed
   one; no tensor is unknown to the architecture;
3. with the plan: those layers and schemes are the planned ones;
4. with the source: dequantized weights are as near as their groups allow, everything else is bit-equal;
5. with a manifest: every file has the recorded sha256.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.checkpoint import Component, ModelFolder, open_model, walk_files
from quantkit.errors import CheckpointError
from quantkit.families.base import Family
from quantkit.families.registry import detect
from quantkit.quantize.export import is_replaced, is_weight_file
from quantkit.quantize.hashes import check_hashes
from quantkit.quantize.plan import PlannedLayer
from quantkit.quantize.progress import OnProgress, Progress, ignore
from quantkit.quantize.tensors import are_equal, open_threads, torch_dtype
from quantkit.quantize.values import LayerError, check_layer
from quantkit.recipe.load import MANIFEST
from quantkit_runtime.checkpoint import TensorInfo


@dataclass
class Verification:
    """The result of a check.

    Attributes:
        problems: One line each; empty if the checkpoint is sound.
        layers: Packed layers by component and name.
        errors: Distance of each packed layer from its source, if the source was given.
        checked: What was checked, in words.
    """

    problems: list[str] = field(default_factory=list)
    layers: dict[str, list[PlannedLayer]] = field(default_factory=dict)
    errors: list[LayerError] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)


def verify(
    checkpoint: Path,
    *,
    source: Path | None = None,
    planned: dict[str, list[PlannedLayer]] | None = None,
    on_progress: OnProgress = ignore,
) -> Verification:
    """Check a quantized checkpoint, whoever wrote it.

    Args:
        checkpoint: A pipeline folder with at least one quantized component.
        source: The 16-bit original; None skips the checks that need it.
        planned: The layers that must be packed, by component; None takes the checkpoint's word.
        on_progress: Told after each layer.

    Raises:
        CheckpointError: If the folder cannot be read as a checkpoint at all, nothing in it is quantized or said to
            be, or the source is.
    """
    result = Verification()
    written = open_model(checkpoint)
    for component in written.components.values():
        component.check_described()
    family = detect(written)
    quantized = [part for part in written.components.values() if part.quantization is not None]
    if not quantized:
        raise CheckpointError(f"{checkpoint}: no component has a quantization_config; it is not quantized")
    for component in written.components.values():
        _ = component.tensors  # reads every header, raises on truncated files and incomplete indexes
        if missing := component.find_missing():
            result.problems.append(missing)
    for component in quantized:
        result.layers[component.name] = _check_structure(component, family, result)
    result.checked.append("components, indexes, shapes, dtypes, names")
    if planned is not None:
        _check_plan(result, planned)
        result.checked.append("layers and schemes against the plan")
    original = _open_original(source) if source is not None else None
    _check_values(quantized, original, result, on_progress)
    result.checked.append("scales and zero points")
    if original is not None:
        _check_untouched(written, original, result)
        result.checked.append("dequantized weights and untouched tensors against the source")
    if (checkpoint / MANIFEST).is_file():
        result.problems += check_hashes(checkpoint, on_progress)
        result.checked.append("sha256 of every file against the manifest")
    return result


def _open_original(source: Path) -> ModelFolder:
    original = open_model(source)
    for component in original.components.values():
        if component.quantization is not None:
            raise CheckpointError(
                f"{component.folder / 'config.json'}: the source is quantized itself; give the 16-bit original"
            )
    return original


def _check_structure(component: Component, family: Family, result: Verification) -> list[PlannedLayer]:
    """Check names, shapes and dtypes; return the layers that are packed as the metadata says."""
    from quantkit_runtime.config import QuantizationConfig
    from quantkit_runtime.errors import CheckpointFormatError

    config_path = component.folder / "config.json"
    try:
        config = QuantizationConfig.from_dict(component.quantization or {})
    except CheckpointFormatError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    for path in walk_files(component.folder):
        if path.suffix == ".safetensors" and is_replaced(component, path) and path not in component.weight_files:
            result.problems.append(f"{path}: belongs to no weights of the component; remove it")
    model = family.build(component)
    expected = family.tensor_shapes(component, model)
    layers = []
    broken = set()
    for linear in family.linears(component, model):
        scheme = config.scheme_for(linear.name)
        if scheme is None:
            continue
        layer = PlannedLayer(linear.name, linear.in_features, linear.out_features, scheme)
        try:
            packed = layer.tensors
        except CheckpointFormatError as error:
            result.problems.append(f"{config_path}: {linear.name}: {error}")
            continue
        layers.append(layer)
        del expected[f"{linear.name}.weight"]
        for name, (shape, dtype) in packed.items():
            expected[name] = shape
            info = component.tensors.get(name)
            if info is not None and torch_dtype(info.dtype) != dtype:
                result.problems.append(f"{info.file}: {name}: is {info.dtype}, not {dtype}")
                broken.add(name)
    result.problems += _compare_names(component, expected, family.foreign)
    broken |= {
        name
        for name, shape in expected.items()
        if name not in component.tensors or component.tensors[name].shape != shape
    }
    return [layer for layer in layers if not broken.intersection(layer.tensors)]


def _compare_names(
    component: Component, expected: dict[str, tuple[int, ...]], foreign: tuple[str, ...]
) -> Iterator[str]:
    found = {name: info for name, info in component.tensors.items() if not name.startswith(foreign)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{component.folder}: lacks {name}"
        elif name not in expected:
            layer, _, suffix = name.rpartition(".")
            if suffix == "weight" and f"{layer}.qweight" in found:
                yield f"{found[name].file}: {name}: a 16-bit weight beside the packed one"
            elif suffix in {"qweight", "qzeros", "scales", "g_idx"}:
                yield f"{found[name].file}: {name}: packed, but quantization_config does not list its layer"
            else:
                yield f"{found[name].file}: {name}: is no tensor of {component.class_name}"
        elif found[name].shape != expected[name]:
            yield f"{found[name].file}: {name}: has shape {list(found[name].shape)}, not {list(expected[name])}"


def _check_plan(result: Verification, planned: dict[str, list[PlannedLayer]]) -> None:
    for name in sorted(planned.keys() | result.layers.keys()):
        wanted = {layer.name: layer for layer in planned.get(name, [])}
        found = {layer.name: layer for layer in result.layers.get(name, [])}
        for layer in sorted(wanted.keys() | found.keys()):
            if layer not in found:
                result.problems.append(f"{name}: {layer}: planned, but not packed")
            elif layer not in wanted:
                result.problems.append(f"{name}: {layer}: packed, but not planned")
            elif wanted[layer] != found[layer]:
                result.problems.append(
                    f"{name}: {layer}: packed as {found[layer].scheme}, planned as {wanted[layer].scheme}"
                )


def _check_values(
    quantized: Sequence[Component], original: ModelFolder | None, result: Verification, on_progress: OnProgress
) -> None:
    layers: list[tuple[Component, PlannedLayer, TensorInfo | None]] = []
    for component in quantized:
        source = original.components.get(component.name) if original is not None else None
        weights = source.tensors if source is not None else {}
        for layer in result.layers[component.name]:
            info = weights.get(f"{layer.name}.weight")
            if original is not None and (info is None or info.shape != (layer.out_features, layer.in_features)):
                result.problems.append(
                    f"{original.folder}: {layer.name}: the source has no such weight of this shape"
                )
                info = None
            layers.append((component, layer, info))
    with open_threads() as threads:
        checks = threads.map(check_layer, *zip(*layers, strict=True))
        for done, ((component, layer, _), (error, problem)) in enumerate(zip(layers, checks, strict=True), start=1):
            if error is not None:
                result.errors.append(error)
            if problem is not None:
                where = component.tensors[f"{layer.name}.qweight"].file
                result.problems.append(f"{where}: {layer.name}: {problem}")
            on_progress(Progress("verify", done, len(layers), layer.name))


def _check_untouched(written: ModelFolder, original: ModelFolder, result: Verification) -> None:
    for name in sorted(original.components.keys() - written.components.keys()):
        result.problems.append(f"{written.folder}: lacks the component {name} of the source")
    for name, component in written.components.items():
        if name not in original.components:
            result.problems.append(f"{component.folder}: the source has no component {name}")
            continue
        source = original.components[name]
        result.problems += _compare_files(component, source)
        if component.quantization is None:
            continue
        packed = {tensor for layer in result.layers[name] for tensor in layer.tensors}
        names = [tensor for tensor in component.tensors if tensor not in packed and tensor in source.tensors]
        result.problems += [
            f"{component.tensors[tensor].file}: {tensor}: differs from the source and is not quantized"
            for tensor in names
            if not are_equal(component.tensors[tensor], source.tensors[tensor])
        ]


def _compare_files(component: Component, source: Component) -> Iterator[str]:
    for path in walk_files(source.folder):
        if component.quantization is not None and is_replaced(source, path):
            continue
        copy = component.folder / path.relative_to(source.folder)
        if not copy.is_file():
            yield f"{copy}: is missing"
        elif is_weight_file(path) and not copy.samefile(path) and not filecmp.cmp(copy, path, shallow=False):
            yield f"{copy}: differs from the source and is not quantized"
