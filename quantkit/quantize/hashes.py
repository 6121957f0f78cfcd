"""Hashes of a checkpoint's files, as its manifest holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantkit.checkpoint import read_json, walk_files
from quantkit.errors import CheckpointError
from quantkit.quantize.progress import OnProgress, Progress
from quantkit.recipe.load import MANIFEST


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
