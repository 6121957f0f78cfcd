"""Text to image: PNG files, and how pictures differ."""

from __future__ import annotations

import numpy as np

from quantkit.compare.difference import difference_map, map_name, paint
from quantkit.compare.media import read_picture, write_picture
from quantkit.compare.result import IMAGES_FOLDER, ImageOutput
from quantkit.compare.tasks.base import Context
from quantkit.compare.tasks.diffusion import DiffusionTask


class Images(DiffusionTask):
    """One image per shot."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        (context.folder / IMAGES_FOLDER).mkdir()

    def write_reference(self, index: int, frames: np.ndarray) -> None:
        """Write the one frame as PNG."""
        self._write(index, "reference", frames[0])

    def score_frames(
        self, index: int, frames: np.ndarray, *, save: bool
    ) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        """Compute every picture metric; the difference map is written as a picture as well."""
        candidate = frames[0]
        reference = read_picture(self.context.folder / self._name(index, "reference"))
        metrics = {name: function(reference, candidate) for name, function in self.functions.items()}
        error = difference_map(reference, candidate)
        if "flip" not in self.unavailable:
            metrics["flip"] = float(error.mean(dtype=np.float64))
        if save:
            self._write(index, "candidate", candidate)
            self._write(index, "difference", paint(error, map_name()))
        return {}, metrics

    def output(self, index: int, *, scored: bool) -> ImageOutput:
        """Return the names of the PNG files."""
        return ImageOutput(
            reference=self._name(index, "reference"),
            candidate=self._name(index, "candidate") if scored else None,
            difference=self._name(index, "difference") if scored else None,
        )

    def _write(self, index: int, role: str, picture: np.ndarray) -> None:
        write_picture(self.context.folder / self._name(index, role), picture)

    def _name(self, index: int, role: str) -> str:
        shot = self.context.shots[index]
        return f"{IMAGES_FOLDER}/prompt{shot.index:04d}-seed{shot.seed}-{role}.png"
