"""Holding the candidate's recordings against the reference's, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantkit.compare.difference import difference_map, paint
from quantkit.compare.metrics import cosine, image_metrics, mae, relative_l2, too_small
from quantkit.compare.result import IMAGES_FOLDER, Item, NoiseFloor
from quantkit.compare.sampler import Shot
from quantkit.compare.summary import trajectory_metrics
from quantkit.compare.trajectory import LatentStore, Trajectory
from quantkit.errors import CheckpointError


class Scorer:
    """Keeps what the reference did and scores the candidate against it.

    Args:
        shots: What both models generate.
        folder: Where images go.
        work: Where latents go that memory has no room for.
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.

    Raises:
        MissingExtraError: If a library that scoring needs is not installed.
        RecipeError: If ``lpips_backbone`` is no AlexNet.
    """

    def __init__(self, shots: Sequence[Shot], folder: Path, work: Path, lpips_backbone: Path | None) -> None:
        self._shots = shots
        self._folder = folder
        self._latents = LatentStore(len(shots), work)
        self._functions, self.unavailable = image_metrics(lpips_backbone)
        self._step_ms: dict[int, float] = {}
        self.timesteps: tuple[float, ...] = ()
        self.items: list[Item] = []
        self.noise_floor: NoiseFloor | None = None
        (folder / IMAGES_FOLDER).mkdir()

    def keep_reference(self, index: int, trajectory: Trajectory) -> None:
        """Keep what the reference did; the same shot again measures the noise floor.

        Raises:
            CheckpointError: If the reference's latents or image are not finite.
        """
        shot = self._shots[index]
        if (failure := _failure(trajectory)) is not None:
            raise CheckpointError(f"the reference cannot be compared with: {failure} ({_name(shot)})")
        if index in self._step_ms:
            kept = self._read_image(index)
            rel_l2 = [relative_l2(*pair) for pair in zip(self._latents.get(index), trajectory.latents, strict=True)]
            self.noise_floor = NoiseFloor(latent_rel_l2=tuple(rel_l2[1:]), image_mae=mae(kept, trajectory.image))
            return
        if index == 0:
            self.timesteps = trajectory.timesteps
            for name, reason in too_small(min(trajectory.image.shape[:2])).items():
                self._functions.pop(name, None)
                self.unavailable[name] = reason
        self._latents.put(index, trajectory.latents)
        self._step_ms[index] = _median_step_ms(trajectory)
        self._write_image(index, "reference", trajectory.image)

    def score_candidate(self, index: int, trajectory: Trajectory) -> None:
        """Append the item of one shot of the candidate.

        Raises:
            CheckpointError: If the two did not start from the same noise or took different steps.
        """
        shot = self._shots[index]
        latents = self._latents.get(index)
        if trajectory.timesteps != self.timesteps or trajectory.latents.shape != latents.shape:
            raise CheckpointError(
                f"reference and candidate took different steps: {len(self.timesteps)} of latents "
                f"{latents.shape[1:]} against {len(trajectory.timesteps)} of {trajectory.latents.shape[1:]}"
            )
        if not np.array_equal(latents[0], trajectory.latents[0]):
            raise CheckpointError(f"reference and candidate started from different noise ({_name(shot)})")

        failure = _failure(trajectory)
        bad_step = trajectory.first_bad_step()
        pairs = list(zip(latents[1:bad_step], trajectory.latents[1:bad_step], strict=True))
        rel_l2 = tuple(relative_l2(*pair) for pair in pairs)
        cosines = tuple(cosine(*pair) for pair in pairs)
        metrics: dict[str, float] = {}
        difference_image = None
        if failure is None:
            metrics = trajectory_metrics(rel_l2, cosines)
            image = self._read_image(index)
            metrics |= {name: function(image, trajectory.image) for name, function in self._functions.items()}
            error = difference_map(image, trajectory.image)
            if "flip" not in self.unavailable:
                metrics["flip"] = float(error.mean(dtype=np.float64))
            if self._step_ms[index] > 0:
                metrics["step_time_ratio"] = _median_step_ms(trajectory) / self._step_ms[index]
            difference_image = self._write_image(index, "difference", paint(error))
        self.items.append(
            Item(
                prompt=shot.prompt,
                seed=shot.seed,
                latent_rel_l2=rel_l2,
                latent_cosine=cosines,
                metrics=metrics,
                failure=None if failure is None else f"{failure} ({_name(shot)})",
                reference_image=self._image_name(index, "reference"),
                candidate_image=(
                    self._write_image(index, "candidate", trajectory.image) if failure is None else None
                ),
                difference_image=difference_image,
            )
        )

    def close(self) -> None:
        """Forget the latents."""
        self._latents.close()

    def _image_name(self, index: int, role: str) -> str:
        shot = self._shots[index]
        return f"{IMAGES_FOLDER}/prompt{shot.prompt:04d}-seed{shot.seed}-{role}.png"

    def _write_image(self, index: int, role: str, image: np.ndarray) -> str:
        from PIL import Image

        name = self._image_name(index, role)
        Image.fromarray(image).save(self._folder / name)
        return name

    def _read_image(self, index: int) -> np.ndarray:
        from PIL import Image

        with Image.open(self._folder / self._image_name(index, "reference")) as image:
            return np.asarray(image)


def _failure(trajectory: Trajectory) -> str | None:
    bad_step = trajectory.first_bad_step()
    if bad_step is not None:
        return f"its latents are not finite from step {bad_step} of {len(trajectory.timesteps)} on"
    return None if trajectory.image_is_finite else "its decoded image is not finite"


def _median_step_ms(trajectory: Trajectory) -> float:
    """Return the median over the steps after the first, 0 if there is only one."""
    return float(np.median(trajectory.step_ms[1:])) if len(trajectory.step_ms) > 1 else 0.0


def _name(shot: Shot) -> str:
    text = shot.text if len(shot.text) <= 60 else f"{shot.text[:57]}..."
    return f'prompt {shot.prompt} "{text}", seed {shot.seed}'
