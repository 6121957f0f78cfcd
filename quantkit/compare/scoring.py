"""Holding the candidate's recordings against the reference's, one output at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.compare.result import Item, NoiseFloor
from quantkit.compare.tasks.base import Recording, Task
from quantkit.errors import CheckpointError


class Scorer:
    """Gives every recording to the task and collects what comes of it.

    Args:
        task: What keeps the reference's recordings and scores the candidate's.
    """

    def __init__(self, task: Task[Any]) -> None:
        self._task = task
        self._shots = task.context.shots
        self._step_ms: dict[int, float] = {}
        self.items: list[Item] = []
        self.noise_floor: NoiseFloor | None = None

    def keep_reference(self, index: int, recording: Recording) -> None:
        """Keep what the reference did; the same shot again measures the noise floor.

        Raises:
            CheckpointError: If it is not finite.
        """
        if (failure := self._task.failure(recording)) is not None:
            raise CheckpointError(f"the reference cannot be compared with: {failure} ({self._shots[index]})")
        if index in self._step_ms:
            score = self._task.score(index, recording, save=False)
            self.noise_floor = NoiseFloor(curves=score.curves, metrics=score.metrics)
            return
        self._step_ms[index] = _median_step_ms(recording)
        self._task.keep(index, recording)

    def score_candidate(self, index: int, recording: Recording) -> None:
        """Append the item of one shot of the candidate.

        Raises:
            CheckpointError: If it cannot be held against the reference's, e.g. started from other noise.
        """
        shot = self._shots[index]
        score = self._task.score(index, recording, save=True)
        metrics = dict(score.metrics)
        own = _median_step_ms(recording)
        if score.failure is None and self._step_ms[index] > 0 and own > 0:
            metrics["step_time_ratio"] = own / self._step_ms[index]
        self.items.append(
            Item(
                prompt=shot.index,
                seed=shot.seed,
                curves=score.curves,
                metrics=metrics,
                failure=None if score.failure is None else f"{score.failure} ({shot})",
                output=score.output,
            )
        )


def _median_step_ms(recording: Recording) -> float:
    """Return the median over the steps after the first, 0 if there is only one."""
    return float(np.median(recording.step_ms)) if recording.step_ms else 0.0
