"""Every metric that a comparison knows: what it means, which way is better, how it is computed.

Two kinds of function, each of one reference and one candidate:

- latents: float32 arrays of one step (any shape) -> a divergence of the trajectories;
- images: uint8 arrays (height, width, 3) -> a difference of the final images.

`METRICS` is the only list of them. Thresholds in recipes name its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from quantkit.compare.lpips import LPIPS_MIN_PIXELS, Lpips, why_no_lpips
from quantkit.errors import MissingExtraError

Kind = Literal["trajectory", "image", "cost"]
Better = Literal["higher", "lower"]
ImageFunction = Callable[[np.ndarray, np.ndarray], float]

PSNR_CAP_DB = 100.0
"""Identical images have an infinite PSNR; it and everything beyond this is reported as this."""

SSIM_MIN_PIXELS = 11
"""Side of SSIM's Gaussian window (sigma 1.5, cut at 3.5 sigma); smaller images have no SSIM."""


@dataclass(frozen=True)
class Metric:
    """What one number of a comparison means.

    Attributes:
        label: Short name for people.
        kind: ``trajectory`` (from latents), ``image`` (from final images), ``cost`` (time and memory).
        unit: Unit, empty where the number has none.
        better: Direction of improvement.
        low: Smallest possible value.
        high: Largest possible value, None where there is none.
        meaning: One sentence.
    """

    label: str
    kind: Kind
    unit: str
    better: Better
    low: float
    high: float | None
    meaning: str


METRICS: Mapping[str, Metric] = {
    "latent_rel_l2": Metric(
        "Latent relative L2, last step", "trajectory", "", "lower", 0, None,
        "||candidate - reference|| / ||reference|| of the final latents.",
    ),
    "latent_rel_l2_median_over_steps": Metric(
        "Latent relative L2, median step", "trajectory", "", "lower", 0, None,
        "Median over the denoising steps of the relative L2 distance of the latents.",
    ),
    "latent_rel_l2_max_over_steps": Metric(
        "Latent relative L2, worst step", "trajectory", "", "lower", 0, None,
        "Largest relative L2 distance of the latents at any denoising step.",
    ),
    "latent_cosine": Metric(
        "Latent cosine, last step", "trajectory", "", "higher", -1, 1,
        "Cosine of the angle between the final latents.",
    ),
    "latent_cosine_min_over_steps": Metric(
        "Latent cosine, worst step", "trajectory", "", "higher", -1, 1,
        "Smallest cosine between the latents at any denoising step.",
    ),
    "psnr": Metric(
        "PSNR", "image", "dB", "higher", 0, PSNR_CAP_DB,
        "Peak signal-to-noise ratio of the 8-bit images, capped at 100 dB (identical images).",
    ),
    "ssim": Metric(
        "SSIM", "image", "", "higher", -1, 1,
        "Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5), mean over the channels.",
    ),
    "mae": Metric(
        "Mean absolute error", "image", "of 255", "lower", 0, 255,
        "Mean absolute difference of the 8-bit channel values.",
    ),
    "rmse": Metric(
        "Root mean square error", "image", "of 255", "lower", 0, 255,
        "Root of the mean squared difference of the 8-bit channel values.",
    ),
    "image_cosine": Metric(
        "Image cosine", "image", "", "higher", 0, 1, "Cosine of the angle between the images' channel values."
    ),
    "image_rel_l2": Metric(
        "Image relative L2", "image", "", "lower", 0, None,
        "||candidate - reference|| / ||reference|| of the images' channel values.",
    ),
    "flip": Metric(
        "FLIP", "image", "", "lower", 0, 1,
        "Mean difference a viewer perceives when flipping between the images (Andersson et al. 2020, 67 ppd).",
    ),
    "lpips": Metric(
        "LPIPS", "image", "", "lower", 0, None,
        "Learned perceptual distance (Zhang et al. 2018, AlexNet, version 0.1).",
    ),
    "step_time_ratio": Metric(
        "Time per step, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the median times of a denoising step, per image.",
    ),
    "peak_memory_ratio": Metric(
        "Peak memory, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the peak memory of loading and sampling.",
    ),
    "weight_memory_ratio": Metric(
        "Weights in memory, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the bytes that the models' parameters and buffers hold.",
    ),
}  # fmt: skip


def relative_l2(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return ||candidate - reference|| / ||reference|| in float64.

    Exactly 0 for equal arrays. Of a reference that is all zero (a black image) the norm of the candidate takes
    the place of the divisor, which makes every difference 1.
    """
    left, right = _wide(reference), _wide(candidate)
    difference = _norm(right - left)
    return 0.0 if difference == 0 else difference / (_norm(left) or _norm(right))


def cosine(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays in float64; exactly 1 for equal arrays.

    Computed as 1 - ||u - v||^2 / 2 of the unit vectors, which keeps small angles that a plain dot product rounds
    away. If one array is all zero, the cosine is 1 when both are and 0 otherwise.
    """
    left, right = _wide(reference), _wide(candidate)
    left_norm, right_norm = _norm(left), _norm(right)
    if left_norm == 0 or right_norm == 0:
        return 1.0 if left_norm == right_norm else 0.0
    return 1.0 - 0.5 * _norm(left / left_norm - right / right_norm) ** 2


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64).ravel()


def _norm(array: np.ndarray) -> float:
    return float(np.sqrt(np.dot(array, array)))


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB, at most `PSNR_CAP_DB`."""
    squared = rmse(reference, candidate) ** 2
    if squared == 0:
        return PSNR_CAP_DB
    return float(min(10 * np.log10(255**2 / squared), PSNR_CAP_DB))


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the structural similarity of two uint8 images of at least `SSIM_MIN_PIXELS` each side."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            reference,
            candidate,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def mae(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the mean absolute difference of two uint8 images, 0 to 255."""
    return float(np.abs(reference.astype(np.float64) - candidate).mean())


def rmse(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the root mean square difference of two uint8 images, 0 to 255."""
    return float(np.sqrt(np.mean((reference.astype(np.float64) - candidate) ** 2)))


def flip_map(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return FLIP's error map of two uint8 images: float32 (height, width), 0 (no difference seen) to 1.

    The metric ``flip`` is its mean; whoever needs both computes the map, which takes seconds, once. This is
    NVIDIA's implementation with its defaults (LDR, 67 pixels per degree).
    """
    from flip_evaluator import nbflip

    left, right = (np.ascontiguousarray(image, dtype=np.float32) / 255 for image in (reference, candidate))
    error, _mean, _parameters = nbflip.evaluate(left, right, False, True, False, False, {})
    return np.asarray(error, dtype=np.float32)[:, :, 0]


def why_no_flip() -> str | None:
    """Return why FLIP cannot be computed here, or None."""
    return (
        "flip-evaluator is not installed: pip install 'quantkit[eval]'"
        if find_spec("flip_evaluator") is None
        else None
    )


def image_metrics(lpips_backbone: Path | None) -> tuple[dict[str, ImageFunction], dict[str, str]]:
    """Return the functions of the image metrics beside ``flip``, and why metrics cannot be computed here.

    Args:
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.

    Raises:
        MissingExtraError: If scikit-image is not installed.
        RecipeError: If ``lpips_backbone`` is given and is no AlexNet.
    """
    if find_spec("skimage") is None:
        raise MissingExtraError("scikit-image", "eval")
    functions: dict[str, ImageFunction] = {
        "psnr": psnr, "ssim": ssim, "mae": mae, "rmse": rmse, "image_cosine": cosine, "image_rel_l2": relative_l2,
    }  # fmt: skip
    unavailable = {}
    if (reason := why_no_flip()) is not None:
        unavailable["flip"] = reason
    if (reason := why_no_lpips(lpips_backbone)) is None:
        functions["lpips"] = Lpips(lpips_backbone)
    else:
        unavailable["lpips"] = reason
    return functions, unavailable


def too_small(side: int) -> dict[str, str]:
    """Return metric -> reason for those that an image whose shorter side has this many pixels cannot have."""
    needs = {"ssim": SSIM_MIN_PIXELS, "lpips": LPIPS_MIN_PIXELS}
    return {
        name: f"needs images of at least {pixels} pixels each side"
        for name, pixels in needs.items()
        if side < pixels
    }
