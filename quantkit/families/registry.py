"""Finding the family of a model without importing any but that one."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from quantkit.checkpoint import Pipeline, open_pipeline
from quantkit.errors import UnsupportedModelError
from quantkit.families.base import Family

# name -> where it is defined, and the classes of pipelines or single models by which it is recognised
_FAMILIES = {
    "bagel": (
        "quantkit.families.bagel:BAGEL",
        ("BagelForConditionalGeneration", "OmniBagelForConditionalGeneration", "bagel"),
    ),
    "flux": ("quantkit.families.flux:FLUX", ("FluxPipeline",)),
    "qwen2.5-omni": (
        "quantkit.families.qwen2_5_omni:QWEN2_5_OMNI",
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
    ),
    "qwen3-omni": ("quantkit.families.qwen3_omni:QWEN3_OMNI", ("Qwen3OmniMoeForConditionalGeneration",)),
}


def family_names() -> list[str]:
    """Return the names of all families."""
    return sorted(_FAMILIES)


def get_family(name: str) -> Family:
    """Return a family by name.

    Raises:
        UnsupportedModelError: If there is none of that name.
    """
    if name not in _FAMILIES:
        close = difflib.get_close_matches(name, _FAMILIES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(family_names())}"
        raise UnsupportedModelError(f"model.family: {name} is unknown ({hint})")
    module, _, attribute = _FAMILIES[name][0].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return family


def detect(model: Path | Pipeline) -> Family:
    """Return the family of a local model folder, by the class of its pipeline or single model.

    Raises:
        CheckpointError: If the folder is no model.
        UnsupportedModelError: If no family knows its class.
    """
    pipeline = open_pipeline(model) if isinstance(model, Path) else model
    for name, (_, classes) in _FAMILIES.items():
        if pipeline.class_name in classes:
            return get_family(name)
    raise UnsupportedModelError(
        f"{pipeline.folder}: no family knows {pipeline.class_name} (known: {', '.join(family_names())})"
    )
