"""The manifest ``quantkit.json``: where a checkpoint comes from and what was done."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from quantkit.quantize.plan import Plan
    from quantkit.quantize.tuning import Tuned
    from quantkit.quantize.values import LayerError

_SCHEMA_VERSION = 1
_LIBRARIES = (
    "quantkit",
    "quantkit-runtime",
    "auto-round",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
)


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that shape a checkpoint."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # rounding does without auto-round
            continue
    return versions


def describe_run(
    loaded: LoadedRecipe,
    plan: Plan,
    errors: Iterable[LayerError],
    tuned: Tuned | None,
    *,
    versions: dict[str, str],
    device: str,
    seconds: float,
    nbytes: int,
) -> dict[str, Any]:
    """Return the manifest of a finished run, but for what is known only of the finished checkpoint.

    Args:
        loaded: The recipe.
        plan: What was done.
        errors: Of every packed layer.
        tuned: What tuning reported; None for round-to-nearest.
        versions: From `library_versions`.
        device: Where tuning ran.
        seconds: Since the run began.
        nbytes: Of the components as they are now.
    """
    described = plan.as_dict()
    for error in errors:
        described[error.component]["layers"][error.name] |= {
            "relative_l2": error.relative_l2,
            "rtn_relative_l2": error.rtn_relative_l2,
        }
    return {
        "schema_version": _SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "family": plan.family,
        "source": {"id": _public_name(loaded.recipe.model.id), "revision": loaded.recipe.model.revision},
        "recipe": {
            "name": loaded.path.name,
            "sha256": loaded.sha256,
            "overrides": list(loaded.overrides),
            "effective": loaded.recipe.model_dump(mode="json"),
        },
        "samples": loaded.recipe.scheme.nsamples if loaded.recipe.scheme.tuned else 0,
        "plan": described,
        "block_losses": [] if tuned is None else [vars(loss) for loss in tuned.losses],
        "sizes": {"before": plan.nbytes_before, "after": nbytes},
        "versions": versions,
        "run": {
            "device": device,
            "threads": _threads(),
            "seconds": round(seconds, 1),
            "resumed_blocks": 0 if tuned is None else tuned.resumed,
            "cached_bytes": 0 if tuned is None else tuned.cached_nbytes,
        },
    }


def _public_name(model_id: str) -> str:
    """Return a model's hub id, or the name of its folder without the path to it."""
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def _threads() -> int:
    import torch

    return torch.get_num_threads()
