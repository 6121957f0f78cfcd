"""Published models without their weights: their configurations, and what follows from those alone.

A folder here is named by a model's id on the hub. It holds the model's configuration files, cut down to the keys
that shape the architecture or that a plan asks for; ``README.md`` says where they come from. `open_published` makes
a source of it that is planned like a downloaded one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Component, ModelFolder, open_model, read_json
from quantkit.families.base import Family
from quantkit.families.registry import detect
from quantkit.recipe.schema import Recipe
from quantkit_runtime.checkpoint import DTYPE_BYTES, TensorInfo

ROOT = Path(__file__).parent
SIZES = ROOT / "sizes.json"
_STORED = "dtypes.json"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a whole model before and after a recipe, as its plan predicts them."""

    before: int
    after: int


@dataclass(frozen=True)
class PublishedComponent(Component):
    """A component whose tensors are those of its architecture, built on the meta device."""

    family: Family
    stored: Mapping[str, str]
    """Dtypes of the published files by the beginning of ``component.tensor``; all others are BF16."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, as the published files hold it; empty if the component has no weights.

        Raises:
            MissingExtraError: If the library that has the class is not installed.
            CheckpointError: If the installed library does not know the class.
        """
        if not self.config:  # a scheduler
            return {}
        model = self.family.build(self)
        tensors = {}
        for name, shape in self.family.tensor_shapes(self, model).items():
            dtype = self._dtype(name)
            nbytes = math.prod(shape) * int(DTYPE_BYTES[dtype])
            tensors[name] = TensorInfo(name, self.folder / "config.json", dtype, shape, nbytes, offset=0)
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def _dtype(self, tensor: str) -> str:
        name = f"{self.name}.{tensor}"
        return next((dtype for start, dtype in self.stored.items() if name.startswith(f"{start}.")), "BF16")


def list_published() -> list[str]:
    """Return the hub ids of all models whose configuration is here."""
    found = {path.parent for index in ("model_index.json", "config.json") for path in ROOT.glob(f"*/*/{index}")}
    return sorted(str(folder.relative_to(ROOT)) for folder in found)


def open_published(hub_id: str) -> ModelFolder:
    """Open a published model without its weights.

    Args:
        hub_id: One of `list_published`.

    Raises:
        UnsupportedModelError: If no family knows it.
    """
    source = open_model(ROOT / hub_id)
    family = detect(source)
    path = source.folder / _STORED
    stored = read_json(path) if path.is_file() else {}
    components = {
        name: PublishedComponent(part.name, part.library, part.class_name, part.folder, family, stored)
        for name, part in source.components.items()
    }
    return replace(source, components=components)


def size_key(recipe: Recipe) -> dict[str, Any]:
    """Return all that the sizes of a plan depend on, JSON-ready."""
    return {
        "model": recipe.model.id,
        "scheme": recipe.scheme.model_dump(mode="json", include={"bits", "group_size", "sym", "data_type"}),
        "layers": recipe.layers.model_dump(mode="json", exclude_defaults=True),
    }


def recall_sizes(recipe: Recipe) -> Sizes | None:
    """Return what the plan of a recipe would predict, without making it.

    ``sizes.json`` holds it for the recipes that come with quantkit, and so for those that differ from one of them
    in nothing that sizes depend on.

    Returns:
        None for any other recipe.
    """
    key = size_key(recipe)
    known = read_json(SIZES)["plans"]
    return next((Sizes(entry["before"], entry["after"]) for entry in known if entry["of"] == key), None)
