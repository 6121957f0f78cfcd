"""Finding the family of a model without importing any but that one."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint import ModelFolder, open_model
from quantkit.errors import UnsupportedModelError
from quantkit.families.base import Family


@dataclass(frozen=True)
class _Entry:
    """Where a family is defined and how it is recognised, without importing it."""

    where: str
    classes: tuple[str, ...]
    """Of pipelines or single models."""
    setting: str | None = None
    """A key of ``model_index.json`` that must be set, where several families share a class."""

    def fits(self, opened: ModelFolder) -> bool:
        return opened.class_name in self.classes and (self.setting is None or bool(opened.config.get(self.setting)))


_FAMILIES = {
    "bagel": _Entry(
        "quantkit.families.bagel:BAGEL",
        ("BagelForConditionalGeneration", "OmniBagelForConditionalGeneration", "bagel"),
    ),
    "flux": _Entry("quantkit.families.flux:FLUX", ("FluxPipeline",)),
    "glm-image": _Entry("quantkit.families.glm_image:GLM_IMAGE", ("GlmImagePipeline",)),
    "ovis-image": _Entry("quantkit.families.ovis_image:OVIS_IMAGE", ("OvisImagePipeline",)),
    "wan2.2-i2v": _Entry("quantkit.families.wan:I2V", ("WanImageToVideoPipeline",), "boundary_ratio"),
    "wan2.2-t2v": _Entry("quantkit.families.wan:T2V", ("WanPipeline",), "boundary_ratio"),
    "wan2.2-ti2v": _Entry("quantkit.families.wan:TI2V", ("WanPipeline",), "expand_timesteps"),
    "qwen2.5-omni": _Entry(
        "quantkit.families.qwen2_5_omni:QWEN2_5_OMNI",
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
    ),
    "qwen3-omni": _Entry("quantkit.families.qwen3_omni:QWEN3_OMNI", ("Qwen3OmniMoeForConditionalGeneration",)),
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
    module, _, attribute = _FAMILIES[name].where.partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return family


def detect(model: Path | ModelFolder) -> Family:
    """Return the family of a local model folder, by its class and, where several share one, by settings.

    Raises:
        CheckpointError: If the folder is no model.
        UnsupportedModelError: If no family knows its class.
    """
    opened = open_model(model) if isinstance(model, Path) else model
    for name, entry in _FAMILIES.items():
        if entry.fits(opened):
            return get_family(name)
    settings = sorted(
        {entry.setting for entry in _FAMILIES.values() if opened.class_name in entry.classes and entry.setting}
    )
    without = f" without {' or '.join(settings)} in model_index.json" if settings else ""
    raise UnsupportedModelError(
        f"{opened.folder}: no family knows {opened.class_name}{without} (known: {', '.join(family_names())})"
    )
