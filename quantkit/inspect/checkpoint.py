"""What is in a checkpoint: components, sizes, schemes, provenance; for any pipeline folder, quantized or not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Component, open_model, read_json
from quantkit.errors import CheckpointError
from quantkit.recipe.load import MANIFEST


@dataclass(frozen=True)
class ComponentSummary:
    """One component.

    Attributes:
        name: E.g. ``transformer``.
        class_name: E.g. ``FluxTransformer2DModel``.
        nbytes: Of all its files.
        tensors: How many.
        dtypes: Bytes by dtype, as safetensors spells it.
        schemes: Packed layers by scheme in words; empty if it is not quantized.
        quantization: Its ``quantization_config``.
    """

    name: str
    class_name: str
    nbytes: int
    tensors: int
    dtypes: dict[str, int]
    schemes: dict[str, int]
    quantization: dict[str, Any] | None


@dataclass(frozen=True)
class Summary:
    """A whole checkpoint; ``provenance`` is its manifest without plan and hashes, None if it has none."""

    folder: Path
    class_name: str
    components: tuple[ComponentSummary, ...]
    provenance: dict[str, Any] | None


def summarize(folder: Path) -> Summary:
    """Read what a pipeline folder holds.

    Raises:
        CheckpointError: If it is no pipeline, or a file of it is damaged.
    """
    model = open_model(folder)
    provenance = None
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        provenance = {key: value for key, value in manifest.items() if key not in {"plan", "files"}}
    components = tuple(_summarize(component) for component in model.components.values())
    return Summary(folder, model.class_name, components, provenance)


def _summarize(component: Component) -> ComponentSummary:
    dtypes: Counter[str] = Counter()
    for info in component.tensors.values():
        dtypes[info.dtype] += info.nbytes
    return ComponentSummary(
        component.name,
        component.class_name,
        component.nbytes,
        len(component.tensors),
        dict(dtypes.most_common()),
        _schemes(component),
        component.quantization,
    )


def _schemes(component: Component) -> dict[str, int]:
    if component.quantization is None:
        return {}
    from quantkit_runtime.config import QuantizationConfig
    from quantkit_runtime.errors import CheckpointFormatError

    try:
        config = QuantizationConfig.from_dict(component.quantization)
    except CheckpointFormatError as error:
        raise CheckpointError(f"{component.folder / 'config.json'}: {error}") from error
    schemes: Counter[str] = Counter()
    for name in component.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            scheme = config.scheme_for(layer)
            label = "packed, but not listed in quantization_config"
            if scheme is not None:
                label = f"W{scheme.bits} g{scheme.group_size} {'sym' if scheme.sym else 'asym'}"
            schemes[label] += 1
    return dict(schemes.most_common())
