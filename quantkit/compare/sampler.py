"""Running every prompt and seed through one model after the other, and measuring what that takes."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from quantkit.checkpoint import ModelFolder
from quantkit.compare.footprint import PeakMemory, disk_bytes, quantization_of, weight_bytes
from quantkit.compare.result import ModelSide
from quantkit.compare.shots import Progress, ProgressCallback, Role, Shot
from quantkit.compare.summary import timing
from quantkit.compare.tasks.base import Recording, Task
from quantkit.errors import MissingExtraError, QuantkitError
from quantkit.recipe.load import MANIFEST

MIN_TIMED_STEPS = 3
"""Below this many the median is a single step's time, and whether the times vary cannot be seen."""

Handle = Callable[[int, Recording], None]
"""Takes the index of the shot and what was recorded of it."""


class Sampler:
    """Runs the same shots through one model after the other.

    Args:
        task: How a model is loaded and what it makes.
        extra_shots: Further outputs that the caller will ask for, counted in the progress.
        on_progress: Called while loading and after every step.
    """

    def __init__(
        self, task: Task[Any], *, extra_shots: int = 0, on_progress: ProgressCallback | None = None
    ) -> None:
        self._task = task
        self._shots = task.context.shots
        self._device = task.context.device
        self._on_progress = on_progress
        self._done = 0
        self._total = 2 * len(self._shots) + extra_shots

    def run(
        self, role: Role, model: ModelFolder, handle: Handle, *, label: str, repeat: Sequence[int] = ()
    ) -> ModelSide:
        """Run all shots, hand each recording over, and let go of the model.

        Args:
            role: Which of the two models it is.
            model: Its folder.
            handle: Takes every recording; its time and memory are not counted as the model's.
            label: What people call the model.
            repeat: Indices of shots to run once more in the end, handed over with the same index and not timed.

        Raises:
            CheckpointError: If the model cannot be loaded.
            RecipeError: If the backend cannot run here.
            QuantkitError: If the device's memory is too small.
        """
        import torch

        _import_ahead(model)
        memory = PeakMemory(self._device)
        try:
            self._report(role, None, 0, 0)
            started = time.perf_counter()
            loaded = self._task.load(model.folder)
            self._task.context.synchronize()
            load_s = time.perf_counter() - started
            step_ms: list[float] = []
            output_s: list[float] = []
            for position, index in enumerate((*range(len(self._shots)), *repeat)):
                recording = self._record(role, loaded, index)
                if position < len(self._shots):
                    step_ms += recording.step_ms
                    output_s.append(recording.total_s)
                with memory.excluded():
                    handle(index, recording)
                self._done += 1
            peak, note = memory.read()
            weights = weight_bytes(loaded.components)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise QuantkitError(
                f"{model.folder}: does not fit into the memory of {self._device}: {reason}"
            ) from error
        seconds = timing(output_s)
        assert seconds is not None, "there is at least one shot"
        return ModelSide(
            label=label,
            path=str(model.folder),
            manifest_sha256=_manifest_sha256(model),
            quantization=quantization_of(model),
            disk_bytes=disk_bytes(model),
            weight_bytes=weights,
            peak_memory_bytes=peak,
            peak_memory_note=note,
            load_s=load_s,
            step_ms=timing(step_ms) if len(step_ms) >= MIN_TIMED_STEPS else None,
            output_s=seconds,
        )

    def _record(self, role: Role, loaded: Any, index: int) -> Recording:
        shot = self._shots[index]
        self._report(role, shot, 0, 0)
        recording: Recording = self._task.record(
            loaded, index, lambda step, steps: self._report(role, shot, step, steps)
        )
        return recording

    def _report(self, role: Role, shot: Shot | None, step: int, steps: int) -> None:
        if self._on_progress is not None:
            fraction = step / steps if steps else 0.0
            self._on_progress(Progress(role, shot, step, steps, self._done + fraction, self._total))


def _import_ahead(model: ModelFolder) -> None:
    """Import the model's classes, so that the memory of the code is not counted as the model's.

    Raises:
        MissingExtraError: If one of the libraries is not installed.
    """
    for component in model.components.values():
        try:
            getattr(importlib.import_module(component.library), component.class_name, None)
        except ImportError as error:
            raise MissingExtraError(component.library, "eval") from error


def _manifest_sha256(model: ModelFolder) -> str | None:
    manifest = model.folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
