"""The loader of every engine that is not given another one."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch  # noqa: F401  (most of the time that importing takes; the start tells of it apart from loading)

from quantkit_runtime.architecture import is_own
from quantkit_runtime.checkpoint import read_json
from quantkit_runtime.load import local_folder
from quantkit_runtime.optional import import_optional
from quantkit_runtime.server.models.base import BatchModel, StreamingModel
from quantkit_runtime.server.protocol import ModelSpec


def load(spec: ModelSpec) -> BatchModel | StreamingModel:
    """Load what a folder holds: a diffusers pipeline, or else one model.

    Raises:
        QuantkitRuntimeError: It cannot be loaded or served.
    """
    _log_as_we_do()
    folder = local_folder(spec.path)
    if (folder / "model_index.json").is_file():
        kind = "diffusion"
    else:
        kind = "bagel" if is_own(read_json(folder / "config.json")) else "chat"
    module = import_module(f"quantkit_runtime.server.models.{kind}")
    model: BatchModel | StreamingModel = module.load(replace(spec, path=str(folder)))
    return model


def _log_as_we_do() -> None:
    """Let the warnings of both libraries go the way of all log lines, and their progress bars nowhere."""
    for library in ("diffusers", "transformers"):
        logs = import_optional(f"{library}.utils.logging")
        logs.disable_progress_bar()
        logs.disable_default_handler()
        logs.enable_propagation()
