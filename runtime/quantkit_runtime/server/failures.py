"""What an exception of a model means for its request, and for the engine."""

from __future__ import annotations

import gc
import sys
import traceback
from typing import Any

from quantkit_runtime.server.models.base import RequestRefusedError
from quantkit_runtime.server.protocol import FailureKind


def classify(error: Exception) -> tuple[FailureKind, str, str | None]:
    """Return kind, message and field of the `Failed` that a request ends with."""
    if isinstance(error, RequestRefusedError):
        return "refused", str(error), error.param
    text = str(error)
    kinds = (MemoryError, getattr(loaded_torch(), "OutOfMemoryError", MemoryError))
    if isinstance(error, kinds) or "can't allocate memory" in text:
        return "out_of_memory", "out of memory; ask for less (size, frames, n), or serve with more", None
    return "internal", reason_of(error), None


def is_broken(error: Exception) -> bool:
    """Whether an error leaves the device in an unknown state."""
    return isinstance(error, getattr(loaded_torch(), "AcceleratorError", ()))


def free_memory(error: Exception) -> None:
    """Give back what the failed run still holds; its frames hang on the exception."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if (torch := loaded_torch()) is not None and torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def reason_of(error: BaseException) -> str:
    """Return class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def loaded_torch() -> Any:
    """Return torch if the model has imported it."""
    return sys.modules.get("torch")
