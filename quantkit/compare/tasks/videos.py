"""Text or image to video: frames as PNG files, and how videos differ in space and time."""

from __future__ import annotations

import numpy as np

from quantkit.compare.frames import frame_values, motion_errors, over_frames, sampled, steadiness
from quantkit.compare.media import read_video, write_video
from quantkit.compare.pictures import flip_map
from quantkit.compare.result import VIDEOS_FOLDER, VideoOutput
from quantkit.compare.tasks.base import Context
from quantkit.compare.tasks.diffusion import DiffusionTask

_ONE_FRAME = "needs at least two frames per video"
_SLOW = ("lpips",)


class Videos(DiffusionTask):
    """One video per shot."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._frames: dict[int, int] = {}
        (context.folder / VIDEOS_FOLDER).mkdir()

    def write_reference(self, index: int, frames: np.ndarray) -> None:
        """Write the frames as PNG."""
        self._frames[index] = len(frames)
        if len(frames) == 1:
            self.unavailable |= dict.fromkeys(("temporal_difference_mae", "temporal_flickering_change"), _ONE_FRAME)
        write_video(self.context.folder / self._name(index, "reference"), frames)

    def score_frames(
        self, index: int, frames: np.ndarray, *, save: bool
    ) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        """Compute the picture metrics frame by frame, the slow ones on a sample, and the change between frames."""
        reference = read_video(self.context.folder / self._name(index, "reference"), range(self._frames[index]))
        fast = {name: function for name, function in self.functions.items() if name not in _SLOW}
        slow = {name: function for name, function in self.functions.items() if name in _SLOW}
        if "flip" not in self.unavailable:
            slow["flip"] = lambda ours, theirs: float(flip_map(ours, theirs).mean(dtype=np.float64))
        values = frame_values(fast, reference, frames)
        some = sampled(len(frames))
        metrics = over_frames(values) | over_frames(frame_values(slow, reference[some], frames[some]))
        curves = {"frame_psnr": tuple(values["psnr"])}
        if len(frames) > 1:
            errors = motion_errors(reference, frames)
            curves["frame_motion_error"] = tuple(errors)
            metrics["temporal_difference_mae"] = float(np.mean(errors))
            metrics["temporal_flickering_change"] = steadiness(frames) - steadiness(reference)
        if save:
            write_video(self.context.folder / self._name(index, "candidate"), frames)
        return curves, metrics

    def output(self, index: int, *, scored: bool) -> VideoOutput:
        """Return the folders of the frames."""
        return VideoOutput(
            reference=self._name(index, "reference"),
            candidate=self._name(index, "candidate") if scored else None,
            frames=self._frames[index],
        )

    def _name(self, index: int, role: str) -> str:
        shot = self.context.shots[index]
        return f"{VIDEOS_FOLDER}/prompt{shot.index:04d}-seed{shot.seed}-{role}"
