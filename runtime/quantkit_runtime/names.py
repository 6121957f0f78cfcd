"""Names of tensors: in a checkpoint's files, and in the model that the installed library makes of it.

transformers moves modules about from release to release and fuses the experts of a layer into one parameter; the
published checkpoints keep the names they were born with. Its own tables say what became what. They are read here
anew for every model and never changed: transformers keeps them in the process for every later load.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantkit_runtime.optional import import_optional


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes.

    Attributes:
        name: Of the model's parameter or buffer.
        pattern: Which part of it the tensor is, for one that is fused of several; None if it is the whole of it.
    """

    name: str
    pattern: str | None


class CheckpointNames:
    """The way from a checkpoint's names to those of a model.

    Args:
        model: Of diffusers or transformers; it may be on the meta device. diffusers renames nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._by_pattern: dict[str, Any] = {}
        if not is_transformers(model):
            return
        loading = import_optional("transformers.core_model_loading")
        mapping = import_optional("transformers.conversion_mapping").get_model_conversion_mapping(model)
        self._rename = loading.rename_source_key
        self._renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def place(self, name: str) -> Place:
        """Return where a tensor of the checkpoint goes; there need not be anything of that name in the model."""
        if not self._renamings and not self._converters:
            return Place(name, None)
        return Place(*self._rename(name, self._renamings, self._converters))

    def module(self, layer: str) -> str:
        """Return the name of the module that a layer or block of the checkpoint is.

        An expert that transformers fuses with others is named as if it were a module of its own in theirs.
        """
        place = self.place(f"{layer}.weight")
        if place.pattern is None:
            return place.name.removesuffix(".weight")
        return ".".join([place.name.rpartition(".")[0], *layer.rsplit(".", 2)[1:]])

    def fuse(self, name: str, parts: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Make the parameters that a checkpoint holds in parts.

        Args:
            name: What `place` said of all of the parts.
            parts: Checkpoint name -> the pattern that `place` said, and the tensor; all of the parts.

        Returns:
            The parameters by their names in the model.
        """
        converter = deepcopy(self._by_pattern[next(iter(parts.values()))[0]])
        for source in sorted(parts, key=_by_number):
            matched, tensor = parts[source]
            converter.add_tensor(name, source, matched, tensor)
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors, real or on the meta device, as its checkpoint names and cuts them."""
    state: dict[str, Tensor] = model.state_dict()
    if not is_transformers(model):
        return state
    reverted: dict[str, Tensor] = import_optional("transformers.core_model_loading").revert_weight_conversion(
        model, state
    )
    return reverted


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort expert 10 behind expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers'."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)
