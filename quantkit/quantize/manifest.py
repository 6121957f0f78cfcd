"""The manifest ``quantkit.json``: where a checkpoint comes from, what was done, and the hash of every file."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import read_json, walk_files
from quantkit.errors import CheckpointError
from quantkit.quantize.progress import OnProgress, Progress
from quantkit.recipe.load import MANIFEST, LoadedRecipe

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


def hash_files(folder: Path, on_progress: OnProgress) -> dict[str, dict[str, Any]]:
    """Return bytes and sha256 of every file below a folder but the manifest, by relative path."""
    paths = [path for path in walk_files(folder) if path != folder / MANIFEST]
    hashes = {}
    with ThreadPoolExecutor() as threads:
        for number, (path, sha256) in enumerate(zip(paths, threads.map(hash_file, paths), strict=True), start=1):
            relative = path.relative_to(folder).as_posix()
            hashes[relative] = {"bytes": path.stat().st_size, "sha256": sha256}
            on_progress(Progress("hash", number, len(paths), relative))
    return hashes


def hash_file(path: Path) -> str:
    """Return a file's sha256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, on_progress: OnProgress) -> Iterable[str]:
    """Compare a checkpoint's files with its manifest; return one line for each difference.

    Raises:
        CheckpointError: If the manifest lists no files.
    """
    recorded = read_json(folder / MANIFEST).get("files")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        raise CheckpointError(f"{folder / MANIFEST}: files: is missing or damaged; copy the checkpoint again")
    found = hash_files(folder, on_progress)
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            yield f"{folder / name}: is missing, the manifest lists it"
        elif name not in recorded:
            yield f"{folder / name}: is not in the manifest"
        elif found[name]["sha256"] != recorded[name].get("sha256"):
            yield f"{folder / name}: has changed since it was written (sha256 differs from the manifest)"


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
