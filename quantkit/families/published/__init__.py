"""Published models without their weights: their configurations, and what follows from those alone.

A folder here is named by a model's id on the hub and holds the keys of its configuration files that shape the
architecture; ``README.md`` says where they come from. `open_published` makes a source of it that can be planned like
a downloaded one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, Pipeline, open_pipeline, read_json
from quantkit.errors import CheckpointError, MissingExtraError
from quantkit.families.base import Family
from quantkit.families.registry import detect
from quantkit_runtime.checkpoint import DTYPE_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent
_STORED = "dtypes.json"


@dataclass(frozen=True)
class PublishedComponent(Component):
    """A component whose tensors are those of its architecture, built on the meta device."""

    family: Family
    stored: Mapping[str, str]
    """Dtypes of the published files by the beginning of ``component.tensor``; all others are BF16."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, as the published files hold it.

        Raises:
            MissingExtraError: If the library that has the class is not installed.
            CheckpointError: If the installed library does not know the class.
        """
        tensors = {}
        for name, shape in self._shapes().items():
            dtype = self._dtype(name)
            nbytes = math.prod(shape) * int(DTYPE_BYTES[dtype])
            tensors[name] = TensorInfo(name, self.folder / "config.json", dtype, shape, nbytes)
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.name in self.family.blocks:
            return self.family.tensor_shapes(self.family.build(self))
        model = _build(self)
        tied = set(_tied_names(model))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}

    def _dtype(self, tensor: str) -> str:
        name = f"{self.name}.{tensor}"
        return next((dtype for start, dtype in self.stored.items() if name.startswith(f"{start}.")), "BF16")


def list_published() -> list[str]:
    """Return the hub ids of all models whose configuration is here."""
    found = {path.parent for index in ("model_index.json", "config.json") for path in ROOT.glob(f"*/*/{index}")}
    return sorted(str(folder.relative_to(ROOT)) for folder in found)


def open_published(hub_id: str) -> Pipeline:
    """Open a published model without its weights.

    Args:
        hub_id: One of `list_published`.

    Raises:
        UnsupportedModelError: If no family knows it.
    """
    pipeline = open_pipeline(ROOT / hub_id)
    family = detect(pipeline)
    path = pipeline.folder / _STORED
    stored = read_json(path) if path.is_file() else {}
    components = {
        name: PublishedComponent(part.name, part.library, part.class_name, part.folder, family, stored)
        for name, part in pipeline.components.items()
    }
    return replace(pipeline, components=components)


def _build(component: Component) -> torch.nn.Module:
    """Build a component that no family quantizes, such as a text encoder, on the meta device."""
    import torch

    from quantkit_runtime.architecture import build_transformers, class_of
    from quantkit_runtime.errors import CheckpointFormatError, MissingDependencyError

    path = component.folder / "config.json"
    try:
        model_class: Any = class_of(component.config, path)
        with torch.device("meta"):
            if component.library == "diffusers":
                model: torch.nn.Module = model_class.from_config(component.config)
                return model
            return build_transformers(model_class, component.config, path, torch.bfloat16)
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error
    except MissingDependencyError as error:
        raise MissingExtraError(component.library, "quantize") from error


def _tied_names(model: torch.nn.Module) -> Iterator[str]:
    """Yield the names of parameters that a file holds under another name."""
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield name
        seen.add(id(parameter))
