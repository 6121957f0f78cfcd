"""Loading one model, running every prompt and seed through it, and measuring what that takes."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint import Pipeline
from quantkit.compare.footprint import PeakMemory, disk_bytes, quantization_of, weight_bytes
from quantkit.compare.result import ModelSide
from quantkit.compare.summary import timing
from quantkit.compare.trajectory import Trajectory, record
from quantkit.errors import CheckpointError, MissingExtraError, QuantkitError, RecipeError
from quantkit.recipe.load import MANIFEST

if TYPE_CHECKING:
    import torch

Role = Literal["reference", "candidate"]
Handle = Callable[[int, Trajectory], None]
"""Takes the index of the shot and what was recorded of it."""


@dataclass(frozen=True)
class Shot:
    """One image to make: index of the prompt, the prompt, the seed."""

    prompt: int
    text: str
    seed: int


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        role: The model that runs.
        shot: The image in work; None while the model loads.
        step: Steps done of it.
        steps: Steps it takes, 0 while the model loads.
        done: Images done of both models, with the fraction of the one in work.
        total: Images of both models.
    """

    role: Role
    shot: Shot | None
    step: int
    steps: int
    done: float
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Settings:
    """How both models are loaded and called.

    Attributes:
        device: Where they run.
        dtype: Of 16 (or 32) bit weights and activations.
        backend: Kernel backend of packed layers.
        call_kwargs: Arguments of the pipeline call beside prompt, generator and callback.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str
    call_kwargs: Mapping[str, Any]


class Sampler:
    """Runs the same shots through one model after the other.

    Args:
        settings: How the models are loaded and called.
        shots: What to generate, in this order.
        extra_shots: Further images that the caller will ask for, counted in the progress.
        on_progress: Called while loading and after every step.
    """

    def __init__(
        self,
        settings: Settings,
        shots: Sequence[Shot],
        *,
        extra_shots: int = 0,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self._settings = settings
        self._shots = shots
        self._on_progress = on_progress
        self._done = 0
        self._total = 2 * len(shots) + extra_shots

    def run(
        self, role: Role, model: Pipeline, handle: Handle, *, label: str, repeat: Sequence[int] = ()
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
        memory = PeakMemory(self._settings.device)
        try:
            self._report(role, None, 0, 0)
            started = time.perf_counter()
            pipeline = self._load(model)
            self._synchronize()
            load_s = time.perf_counter() - started
            step_ms: list[float] = []
            image_s: list[float] = []
            for position, index in enumerate((*range(len(self._shots)), *repeat)):
                trajectory = self._record(role, pipeline, self._shots[index])
                if position < len(self._shots):
                    step_ms += trajectory.step_ms[1:]  # the first step pays for warm-up
                    image_s.append(trajectory.total_s)
                with memory.excluded():
                    handle(index, trajectory)
                self._done += 1
            peak, note = memory.read()
            weights = weight_bytes(pipeline.components)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise QuantkitError(
                f"{model.folder}: does not fit into the memory of {self._settings.device}: {reason}"
            ) from error
        seconds = timing(image_s)
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
            step_ms=timing(step_ms),
            image_s=seconds,
        )

    def _load(self, model: Pipeline) -> Any:
        import quantkit_runtime
        from quantkit_runtime.errors import BackendUnavailableError, QuantkitRuntimeError

        settings = self._settings
        try:
            pipeline = quantkit_runtime.load_pipeline(
                model.folder, device=settings.device, dtype=settings.dtype, backend=settings.backend
            )
        except BackendUnavailableError as error:
            raise RecipeError(str(error)) from error
        except QuantkitRuntimeError as error:
            raise CheckpointError(str(error)) from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _record(self, role: Role, pipeline: Any, shot: Shot) -> Trajectory:
        self._report(role, shot, 0, 0)
        return record(
            pipeline,
            shot.text,
            shot.seed,
            self._settings.call_kwargs,
            synchronize=self._synchronize,
            on_step=lambda step, steps: self._report(role, shot, step + 1, steps),
        )

    def _synchronize(self) -> None:
        import torch

        if self._settings.device.type != "cpu":
            torch.accelerator.synchronize(self._settings.device)

    def _report(self, role: Role, shot: Shot | None, step: int, steps: int) -> None:
        if self._on_progress is not None:
            fraction = step / steps if steps else 0.0
            self._on_progress(Progress(role, shot, step, steps, self._done + fraction, self._total))


def _import_ahead(model: Pipeline) -> None:
    """Import the model's classes, so that the memory of the code is not counted as the model's.

    Raises:
        MissingExtraError: If one of the libraries is not installed.
    """
    for component in model.components.values():
        try:
            getattr(importlib.import_module(component.library), component.class_name, None)
        except ImportError as error:
            raise MissingExtraError(component.library, "eval") from error


def _manifest_sha256(model: Pipeline) -> str | None:
    manifest = model.folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
