"""What images and videos have in common: a pipeline, latents along the denoising path, frames in the end."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.compare.pictures import cosine_distance, picture_functions, relative_l2, too_small
from quantkit.compare.result import Output
from quantkit.compare.shots import StepCallback
from quantkit.compare.summary import trajectory_metrics
from quantkit.compare.tasks.base import Context, Score, Task, load_with
from quantkit.compare.trajectory import LatentStore, Trajectory, record
from quantkit.errors import CheckpointError, RecipeError
from quantkit.recipe.schema import Sampling


class DiffusionTask(Task[Trajectory]):
    """A task of diffusers pipelines; what is left open is how frames are kept and scored.

    Raises:
        MissingExtraError: If a library that scoring needs is not installed.
        RecipeError: If the AlexNet weights for LPIPS are no good.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.functions, self.unavailable = picture_functions(context.lpips_backbone)
        self._latents = LatentStore(len(context.shots), context.work)

    @abstractmethod
    def write_reference(self, index: int, frames: np.ndarray) -> None:
        """Write the reference's frames beside the result."""

    @abstractmethod
    def score_frames(
        self, index: int, frames: np.ndarray, *, save: bool
    ) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        """Return curves and metrics of frames (uint8) against the reference's, written beside it with ``save``."""

    @abstractmethod
    def output(self, index: int, *, scored: bool) -> Output:
        """Return where the outputs of a shot are; without the candidate's where it could not be scored."""

    def load(self, folder: Path) -> Any:
        """Load the pipeline through the runtime."""
        import quantkit_runtime

        pipeline = load_with(quantkit_runtime.load_pipeline, folder, self.context)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def record(self, model: Any, index: int, on_step: StepCallback) -> Trajectory:
        """Generate, with the latents of every step.

        Raises:
            RecipeError: If the pipeline refuses what it is asked for, e.g. a size.
        """
        shot = self.context.shots[index]
        inputs = self.context.family.prompt_kwargs(shot.prompt) | self.context.call_kwargs
        try:
            return record(model, inputs, shot.seed, synchronize=self.context.synchronize, on_step=on_step)
        except ValueError as error:  # of the checks that begin every call in diffusers
            raise RecipeError(f"sampling: {type(model).__name__} refuses it: {error}") from error

    def failure(self, recording: Trajectory) -> str | None:
        """Name the first step whose latents are not finite, or a decoder's output that is not."""
        bad_step = recording.first_bad_step()
        if bad_step is not None:
            return f"its latents are not finite from step {bad_step} of {len(recording.timesteps)} on"
        if recording.frames_are_finite:
            return None
        return f"its decoded {'image' if len(recording.frames) == 1 else 'video'} is not finite"

    def keep(self, index: int, recording: Trajectory) -> None:
        """Keep latents in memory or a file, frames beside the result."""
        if index == 0:
            self.timesteps = recording.timesteps
            frames, height, width = recording.frames.shape[:3]
            asked = self.context.call_kwargs
            self.made = Sampling(height=height, width=width, num_frames=frames if "num_frames" in asked else None)
            for name, reason in too_small(min(recording.frames.shape[1:3])).items():
                self.functions.pop(name, None)
                self.unavailable[name] = reason
        self._latents.put(index, recording.latents)
        self.write_reference(index, recording.frames)

    def score(self, index: int, recording: Trajectory, *, save: bool) -> Score:
        """Compare the latents of every step, then the frames.

        Raises:
            CheckpointError: If the two did not start from the same noise or took different steps.
        """
        latents = self._latents.get(index)
        if recording.timesteps != self.timesteps or recording.latents.shape != latents.shape:
            raise CheckpointError(
                f"reference and candidate took different steps: {len(self.timesteps)} of latents "
                f"{latents.shape[1:]} against {len(recording.timesteps)} of {recording.latents.shape[1:]}"
            )
        if not np.array_equal(latents[0], recording.latents[0]):
            raise CheckpointError(
                f"reference and candidate started from different noise ({self.context.shots[index]})"
            )
        failure = self.failure(recording)
        bad_step = recording.first_bad_step()
        pairs = list(zip(latents[1:bad_step], recording.latents[1:bad_step], strict=True))
        curves = {
            "latent_rel_l2": tuple(relative_l2(*pair) for pair in pairs),
            "latent_cosine_distance": tuple(cosine_distance(*pair) for pair in pairs),
        }
        metrics: dict[str, float] = {}
        if failure is None:
            metrics = trajectory_metrics(curves["latent_rel_l2"], curves["latent_cosine_distance"])
            more_curves, more_metrics = self.score_frames(index, recording.frames, save=save)
            curves |= more_curves
            metrics |= more_metrics
        return Score(curves, metrics, failure, self.output(index, scored=failure is None))

    def close(self) -> None:
        """Forget the latents."""
        self._latents.close()
