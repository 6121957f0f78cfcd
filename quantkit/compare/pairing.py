"""Whether two pipelines on disk are the same architecture, so that comparing them says something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint import Component, ModelFolder, read_json
from quantkit.errors import UnsupportedModelError

# Converters rename these classes (slow or fast, by library version) without changing what they do.
_CLASSLESS = ("tokenizer", "feature_extractor", "image_processor", "processor")
_NOT_ARCHITECTURE = frozenset(
    {"architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"}
)
_MAX_SHOWN = 3


def check_same_architecture(reference: ModelFolder, candidate: ModelFolder) -> None:
    """Compare the classes and configurations of all components, the scheduler's included.

    Keys that only one side has are left out: a later library writes defaults that an earlier one did not know.

    Raises:
        CheckpointError: If a JSON file is damaged.
        UnsupportedModelError: If the two differ, naming the first few differences.
    """
    differences = _class_differences(reference, candidate)
    if not differences:
        for name, component in reference.components.items():
            if name in candidate.components:
                differences += _config_differences(component, candidate.components[name])
    if differences:
        more = len(differences) - _MAX_SHOWN
        shown = "; ".join(differences[:_MAX_SHOWN]) + (f"; {more} more" if more > 0 else "")
        raise UnsupportedModelError(
            f"{candidate.folder}: is not of the same architecture as the reference {reference.folder}: {shown} "
            "(reference against candidate)"
        )


def _class_differences(reference: ModelFolder, candidate: ModelFolder) -> list[str]:
    if reference.class_name != candidate.class_name:
        return [f"pipeline {reference.class_name} against {candidate.class_name}"]
    ours, theirs = _classes(reference), _classes(candidate)
    return [
        f"{name} {ours.get(name, 'missing')} against {theirs.get(name, 'missing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _classes(model: ModelFolder) -> dict[str, str]:
    return {
        name: component.class_name
        for name, component in model.components.items()
        if not name.startswith(_CLASSLESS)
    }


def _config_differences(reference: Component, candidate: Component) -> list[str]:
    ours, theirs = reference.config, candidate.config
    schedulers = [side.folder / "scheduler_config.json" for side in (reference, candidate)]
    if all(path.is_file() for path in schedulers):
        ours, theirs = map(read_json, schedulers)
    return _differences(f"{reference.name}.", ours, theirs)


def _differences(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted(ours.keys() & theirs.keys()):
        left, right = ours[key], theirs[key]
        if key in _NOT_ARCHITECTURE or key.startswith("_") or left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(f"{where}{key}.", left, right)
        else:
            found.append(f"{where}{key} {json.dumps(left)} against {json.dumps(right)}")
    return found
