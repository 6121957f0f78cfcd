"""Models from the hub."""

from __future__ import annotations

from pathlib import Path

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.optional import import_optional


def download(hub_id: str, revision: str | None = None) -> Path:
    """Return the folder of a model of the hub, downloaded where it is not in the cache already.

    Args:
        hub_id: Like ``org/name``.
        revision: Commit, tag or branch.

    Raises:
        CheckpointFormatError: The hub does not give it.
        MissingDependencyError: It is a pipeline, and diffusers is not installed.
    """
    hub = import_optional("huggingface_hub")
    try:
        folder = hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=["model_index.json", "config.json"]
        )
        if not Path(folder, "model_index.json").is_file():  # a single model; its pickles are never read
            return Path(hub.snapshot_download(hub_id, revision=revision, ignore_patterns=["*.bin", "*.pth"]))
        # diffusers knows which files of a repository its pipeline needs; FLUX.1-dev holds the weights twice.
        pipeline = import_optional("diffusers").DiffusionPipeline
        return Path(pipeline.download(hub_id, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointFormatError(
            f"{hub_id}: no such folder, and not available from the hub ({reason.removeprefix('Got: ')})"
        ) from error
