"""Turning what a user types for a model into a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from quantkit.errors import CheckpointError, MissingExtraError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(text: str, revision: str | None = None) -> Path:
    """Return the folder of a model given as ``demo``, as a path or as a hub id.

    Args:
        text: What the user gave.
        revision: Commit, tag or branch, for hub ids.

    Raises:
        CheckpointError: If it is no folder and cannot be downloaded.
        MissingExtraError: If a download needs diffusers and it is not installed.
    """
    if text == "demo":
        import quantkit.demo

        return quantkit.demo.path()
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text}: is a file; give the root folder of a model")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such folder")
    return _download(text, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingExtraError("diffusers", "quantize") from error
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=["model_index.json", "config.json"])
        if not Path(folder, "model_index.json").is_file():  # a single model
            return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=["*.bin", "*.pth"]))
        # diffusers knows which files of a repository its pipeline needs; FLUX.1-dev holds the weights twice.
        return Path(DiffusionPipeline.download(hub_id, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{hub_id}: no such folder, and it cannot be downloaded: {reason}") from error
