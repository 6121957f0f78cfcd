"""Running a pipeline once while recording the latents of every step, and keeping many such recordings."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.compare.shots import StepCallback
from quantkit.errors import CheckpointError

MEMORY_BUDGET_BYTES = 2**30
"""Latents of the reference beyond this are kept in a memory-mapped file."""


@dataclass(frozen=True)
class Trajectory:
    """One generation, step by step.

    Attributes:
        latents: float32 (steps + 1, ...), the initial noise first, in the scheduler's own layout.
        timesteps: The scheduler's timestep of every step.
        frames: uint8 (frames, height, width, 3); an image is a video of one frame.
        frames_are_finite: Whether the decoder's output was, before it became 8 bit.
        step_ms: Milliseconds of every step but the first, which pays for warm-up; the copy of the latents to the
            host is not in it.
        total_s: Seconds from call to output.
    """

    latents: np.ndarray
    timesteps: tuple[float, ...]
    frames: np.ndarray
    frames_are_finite: bool
    step_ms: tuple[float, ...]
    total_s: float

    def first_bad_step(self) -> int | None:
        """Return the first step (1 is the first) whose latents are not finite, or None; 0 is the noise itself."""
        finite = np.isfinite(self.latents.reshape(len(self.latents), -1)).all(axis=1)
        return None if finite.all() else int(np.argmin(finite))


@dataclass
class _Recorder:
    """Takes what the scheduler's first step gets and then the latents after every step, and times the steps."""

    synchronize: Callable[[], None]
    on_step: StepCallback | None
    latents: list[np.ndarray] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    step_started: float = 0.0

    @contextmanager
    def listening(self, scheduler: Any) -> Iterator[None]:
        """Take the noise from the scheduler's first step.

        What the denoiser gets may be cast, doubled for guidance or joined with an image, and may go to either of
        two experts; the scheduler's step gets the latents alone, in full precision.
        """
        step = scheduler.step

        @functools.wraps(step)
        def listened(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.latents:
                self.latents.append(_to_host(sample))
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = listened
        try:
            yield
        finally:
            del scheduler.step

    def after_step(self, pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        self.synchronize()
        if self.timesteps:
            self.step_ms.append((time.perf_counter() - self.step_started) * 1e3)
        self.latents.append(_to_host(tensors["latents"]))
        self.timesteps.append(float(timestep))
        if self.on_step is not None:
            self.on_step(step + 1, int(pipeline.num_timesteps))
        self.step_started = time.perf_counter()
        return {}


def _to_host(tensor: Any) -> np.ndarray:
    # The copy matters: schedulers may write into the tensor they handed out.
    array: np.ndarray = tensor.detach().float().cpu().numpy().copy()
    return array


def record(
    pipeline: Any,
    inputs: Mapping[str, Any],
    seed: int,
    *,
    synchronize: Callable[[], None] = lambda: None,
    on_step: StepCallback | None = None,
) -> Trajectory:
    """Generate one image or video with a diffusers pipeline and record the way to it.

    The noise is drawn on the CPU, so that the same seed starts from the same noise on every device.

    Args:
        pipeline: A diffusers pipeline whose call takes ``callback_on_step_end``.
        inputs: Arguments of the call (prompt, image, size, steps, guidance ...).
        seed: Seed of the initial noise.
        synchronize: Waits until the device has finished its work.
        on_step: Called after every step.

    Raises:
        CheckpointError: If the pipeline has no scheduler, or ran no step.
    """
    import torch

    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise CheckpointError(f"{type(pipeline).__name__} has no scheduler whose steps could be recorded")
    recorder = _Recorder(synchronize, on_step)
    started = time.perf_counter()
    with recorder.listening(scheduler):
        output = pipeline(
            **inputs,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=recorder.after_step,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="np",
        )
    if not recorder.timesteps:
        raise CheckpointError(f"{type(pipeline).__name__} ran no denoising step")
    # A pipeline gives a list of images or of videos; one of either was asked for.
    made = output.images if hasattr(output, "images") else output.frames[0]
    frames = np.asarray(made, dtype=np.float32)
    finite = bool(np.isfinite(frames).all())
    return Trajectory(
        latents=np.stack(recorder.latents),
        timesteps=tuple(recorder.timesteps),
        frames=(np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8),
        frames_are_finite=finite,
        step_ms=tuple(recorder.step_ms),
        total_s=time.perf_counter() - started,
    )


class LatentStore:
    """Latents of many trajectories of one shape, in memory or, beyond a budget, in a file.

    Args:
        count: Trajectories to keep.
        folder: Where the file goes; it is the caller's to remove.
        budget_bytes: What may be held in memory.
    """

    def __init__(self, count: int, folder: Path, budget_bytes: int = MEMORY_BUDGET_BYTES) -> None:
        self._count = count
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._latents: np.ndarray | None = None
        self.file: Path | None = None

    def put(self, index: int, latents: np.ndarray) -> None:
        """Keep the float32 latents (steps + 1, ...) of one trajectory."""
        if self._latents is None:
            self._latents = self._allocate(latents)
        self._latents[index] = latents

    def get(self, index: int) -> np.ndarray:
        """Return what was put at this index."""
        if self._latents is None:
            raise IndexError(index)
        kept: np.ndarray = self._latents[index]
        return kept

    def _allocate(self, first: np.ndarray) -> np.ndarray:
        shape = (self._count, *first.shape)
        if first.nbytes * self._count <= self._budget_bytes:
            return np.empty(shape, dtype=np.float32)
        self.file = self._folder / "latents.f32"
        # Writing zeros takes the space now: a full disk is then an error here and no bus error later.
        with self.file.open("wb") as file:
            for _ in range(self._count):
                file.write(bytes(first.nbytes))
        return np.memmap(self.file, dtype=np.float32, mode="r+", shape=shape)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._latents = None
        if self.file is not None:
            self.file.unlink(missing_ok=True)
