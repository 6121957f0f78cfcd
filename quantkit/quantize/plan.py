"""The plan: exactly which Linear layers are quantized, each with its scheme, and what that does to the sizes.

It is computed from the real architecture on the meta device and the checkpoint's headers, never from weights.
Everything after it keeps to it: the tuning gets it, the export writes it, the verification checks it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder
from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.base import Family, Linear
from quantkit.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from quantkit_runtime.config import Scheme

PACKING_FORMAT = "auto_round:auto_gptq"
_SOURCE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class PlannedLayer:
    """A Linear that is quantized."""

    name: str
    in_features: int
    out_features: int
    scheme: Scheme

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every tensor that replaces the weight, by its full name."""
        from quantkit_runtime.format import packed_tensors

        packed = packed_tensors(self.in_features, self.out_features, self.scheme)
        return {f"{self.name}.{suffix}": layout for suffix, layout in packed.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of those tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


@dataclass(frozen=True)
class ComponentPlan:
    """What happens to one component that is quantized."""

    component: Component
    blocks: tuple[str, ...]
    """The module lists that hold the repeated blocks."""
    aliases: Mapping[str, str]
    """Other names of blocks, see `quantkit.families.base.Family`."""
    default: Scheme
    """The scheme of every layer that no override names."""
    layers: tuple[PlannedLayer, ...]
    kept: tuple[tuple[str, str], ...]
    """Linears that stay in 16 bit, each with the reason."""

    @property
    def nbytes_before(self) -> int:
        """Bytes of the component's tensors in the source."""
        return sum(info.nbytes for info in self.component.tensors.values())

    @property
    def nbytes_after(self) -> int:
        """Bytes of the component's tensors in the export."""
        weights = sum(self.component.tensors[f"{layer.name}.weight"].nbytes for layer in self.layers)
        return self.nbytes_before - weights + sum(layer.nbytes for layer in self.layers)

    @property
    def kept_in_blocks(self) -> list[str]:
        """Linears inside the blocks that stay in 16 bit; loaders must be told of them."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return [name for name, _ in self.kept if name.startswith(prefixes)]


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model."""

    family: str
    source: ModelFolder
    components: tuple[ComponentPlan, ...]

    @property
    def nbytes_before(self) -> int:
        """Bytes of all files of the source."""
        return sum(component.nbytes for component in self.source.components.values())

    @property
    def nbytes_after(self) -> int:
        """Bytes of all files of the export, as predicted."""
        return self.nbytes_before + sum(part.nbytes_after - part.nbytes_before for part in self.components)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data, for the manifest."""
        return {
            part.component.name: {
                "class": part.component.class_name,
                "layers": {
                    layer.name: {
                        "in_features": layer.in_features,
                        "out_features": layer.out_features,
                        "bits": layer.scheme.bits,
                        "group_size": layer.scheme.group_size,
                        "sym": layer.scheme.sym,
                    }
                    for layer in part.layers
                },
                "kept": dict(part.kept),
                "bytes_before": part.nbytes_before,
                "bytes_after": part.nbytes_after,
            }
            for part in self.components
        }


def make_plan(source: ModelFolder, family: Family, recipe: Recipe) -> Plan:
    """Decide which layers of a model are quantized and how.

    Args:
        source: The 16-bit model.
        family: The family the source belongs to.
        recipe: Gives the scheme and the choice of layers.

    Raises:
        CheckpointError: If the weights do not fit the architecture, or are quantized already.
        RecipeError: If a pattern matches no Linear, or a scheme does not fit a layer.
    """
    components = []
    for name in _choose_components(family, recipe):
        if name not in source.components:
            raise CheckpointError(f"{source.folder}: a {family.name} model needs the component {name}")
        component = source.components[name]
        if component.quantization is not None:
            raise CheckpointError(
                f"{component.folder / 'config.json'}: is quantized already; give the 16-bit original"
            )
        model = family.build(component)
        _check_weights(component, family.tensor_shapes(component, model), family.foreign)
        components.append(_plan_component(component, family, list(family.linears(component, model)), recipe))
    _check_patterns_match(components, recipe)
    if not any(part.layers for part in components):
        raise RecipeError("layers: nothing is left to quantize; widen include or shorten exclude")
    return Plan(family.name, source, tuple(components))


def _choose_components(family: Family, recipe: Recipe) -> list[str]:
    chosen = recipe.layers.components
    if chosen is None:
        return [name for name in family.blocks if name not in family.optional]
    for name in chosen:
        if name not in family.blocks:
            raise RecipeError(f"layers.components: {family.name} quantizes {', '.join(family.blocks)}, not {name}")
        if recipe.scheme.tuned and name in family.optional:
            raise RecipeError(
                f"layers.components: {name} can only be rounded to nearest; set scheme.iters: 0 or leave it out"
            )
    return [name for name in family.blocks if name in chosen]


def _check_weights(component: Component, expected: Mapping[str, tuple[int, ...]], foreign: tuple[str, ...]) -> None:
    """Check that the checkpoint holds exactly the tensors of the architecture, beside foreign ones."""
    found = {name: info.shape for name, info in component.tensors.items() if not name.startswith(foreign)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{component.folder}: the weights lack {name}; download the model again")
        if name not in expected:
            raise CheckpointError(
                f"{component.tensors[name].file}: {name} is no tensor of {component.class_name}; "
                "weights and config.json do not belong together"
            )
        if expected[name] != found[name]:
            raise CheckpointError(
                f"{component.tensors[name].file}: {name} has shape {list(found[name])}, "
                f"config.json says {list(expected[name])}"
            )


def _plan_component(
    component: Component, family: Family, linears: Sequence[Linear], recipe: Recipe
) -> ComponentPlan:
    from quantkit_runtime.config import Scheme

    scheme = recipe.scheme
    default = Scheme(scheme.bits, scheme.group_size, scheme.sym, scheme.data_type, PACKING_FORMAT)
    layers, kept, misfits = [], [], []
    for linear in linears:
        reason = _why_kept(component.name, linear, recipe)
        chosen = default
        for override in recipe.layers.overrides:
            if reason is None and _matches(override.match, component.name, linear.name):
                given = override.model_dump(include={"bits", "group_size", "sym"}, exclude_none=True)
                chosen = replace(default, **given)
                reason = "kept by layers.overrides" if override.keep else None
        if reason is not None:
            kept.append((linear.name, reason))
            continue
        source = component.tensors[f"{linear.name}.weight"]
        if source.dtype not in _SOURCE_DTYPES:
            raise CheckpointError(
                f"{source.file}: {source.name} is {source.dtype}; weights are quantized from "
                f"{', '.join(_SOURCE_DTYPES)}: give the original in one of these"
            )
        layer = PlannedLayer(linear.name, linear.in_features, linear.out_features, chosen)
        if problem := _misfit(layer):
            key = "scheme.group_size" if chosen == default else "layers.overrides"
            misfits.append(f"{key}: {problem}")
        layers.append(layer)
    if misfits:
        more = f" (and {len(misfits) - 1} more layers)" if len(misfits) > 1 else ""
        raise RecipeError(f"{misfits[0]}{more}")
    _check_experts_alike(layers, kept)
    blocks = family.blocks[component.name]
    return ComponentPlan(component, blocks, family.aliases, default, tuple(layers), tuple(kept))


def _check_experts_alike(layers: Sequence[PlannedLayer], kept: Sequence[tuple[str, str]]) -> None:
    """Refuse to store the experts of one layer in several ways: everything that runs them takes them as one."""
    found: dict[str, Scheme | None] = {}
    for name, scheme in [*((layer.name, layer.scheme) for layer in layers), *((name, None) for name, _ in kept)]:
        home, mark, _ = name.partition(".experts.")
        if mark and found.setdefault(home, scheme) != scheme:
            raise RecipeError(
                f"layers: {name} would be stored in another way than other experts of {home}; give patterns that "
                "match all of them"
            )


def _matches(pattern: str, component: str, layer: str) -> bool:
    """Whether a recipe's pattern means a layer: by its name, or by its component's and its own."""
    return fnmatchcase(layer, pattern) or fnmatchcase(f"{component}.{layer}", pattern)


def _why_kept(component: str, linear: Linear, recipe: Recipe) -> str | None:
    choice = recipe.layers
    if any(_matches(pattern, component, linear.name) for pattern in choice.exclude):
        return "excluded by layers.exclude"
    if choice.include is None:
        return linear.keep_reason
    if any(_matches(pattern, component, linear.name) for pattern in choice.include):
        # A pattern must not silently reach layers that loaders never look for.
        return None if linear.optional else linear.keep_reason
    return "not in layers.include"


def _misfit(layer: PlannedLayer) -> str | None:
    """Return why a layer cannot be stored in its scheme."""
    from quantkit_runtime.errors import CheckpointFormatError

    size = layer.scheme.group_size
    if size != -1 and layer.in_features % size:
        fitting = [str(other) for other in (32, 64, 128, 256) if layer.in_features % other == 0]
        mend = f"choose {' or '.join(fitting)}, or exclude it" if fitting else "choose -1, or exclude it"
        return f"{size} does not divide in_features {layer.in_features} of {layer.name}; {mend}"
    try:
        _ = layer.tensors
    except CheckpointFormatError as error:
        return f"{layer.name}: {error}"
    return None


def _check_patterns_match(components: Sequence[ComponentPlan], recipe: Recipe) -> None:
    """Refuse patterns that match nothing: they are mistakes, and silence would quantize something else."""
    names = [(part.component.name, name) for part in components for name in _linear_names(part)]
    patterns = [
        *(("layers.include", pattern) for pattern in recipe.layers.include or ()),
        *(("layers.exclude", pattern) for pattern in recipe.layers.exclude),
        *(("layers.overrides", override.match) for override in recipe.layers.overrides),
    ]
    problems = []
    for key, pattern in patterns:
        if not any(_matches(pattern, component, name) for component, name in names):
            known = [spelled for component, name in names for spelled in (name, f"{component}.{name}")]
            close = difflib.get_close_matches(pattern, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            problems.append(f"{key}: {pattern} matches no Linear of the model{hint}")
    if problems:
        raise RecipeError(*problems)


def _linear_names(part: ComponentPlan) -> Iterator[str]:
    yield from (layer.name for layer in part.layers)
    yield from (name for name, _ in part.kept)
