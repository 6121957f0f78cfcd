"""Differences of two pictures.

A picture is a uint8 array (height, width, 3): an image, or one frame of a video. Every function takes the reference
first. `quantkit.compare.metrics` says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from quantkit.compare.lpips import LPIPS_MIN_PIXELS, Lpips, why_no_lpips
from quantkit.compare.metrics import PSNR_CAP_DB
from quantkit.errors import MissingExtraError

PictureFunction = Callable[[np.ndarray, np.ndarray], float]

SSIM_MIN_PIXELS = 11
"""Side of SSIM's Gaussian window (sigma 1.5, cut at 3.5 sigma); smaller pictures have no SSIM."""


def relative_l2(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return ||candidate - reference|| / ||reference|| in float64.

    Exactly 0 for equal arrays. Of a reference that is all zero (a black image) the norm of the candidate takes
    the place of the divisor, which makes every difference 1.
    """
    left, right = _wide(reference), _wide(candidate)
    difference = _norm(right - left)
    return 0.0 if difference == 0 else difference / (_norm(left) or _norm(right))


def cosine(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays in float64; exactly 1 for equal arrays."""
    return 1.0 - cosine_distance(reference, candidate)


def cosine_distance(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return 1 - cosine of the angle between two arrays in float64; exactly 0 for equal arrays.

    Computed as ||u - v||^2 / 2 of the unit vectors, which keeps small angles that a plain dot product rounds away.
    If one array is all zero, the cosine is 1 when both are and 0 otherwise.
    """
    left, right = _wide(reference), _wide(candidate)
    left_norm, right_norm = _norm(left), _norm(right)
    if left_norm == 0 or right_norm == 0:
        return 0.0 if left_norm == right_norm else 1.0
    return 0.5 * _norm(left / left_norm - right / right_norm) ** 2


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64).ravel()


def _norm(array: np.ndarray) -> float:
    return float(np.sqrt(np.dot(array, array)))


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB, at most `PSNR_CAP_DB`."""
    squared = rmse(reference, candidate) ** 2
    if squared == 0:
        return PSNR_CAP_DB
    return float(min(10 * np.log10(255**2 / squared), PSNR_CAP_DB))


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the structural similarity of two pictures of at least `SSIM_MIN_PIXELS` each side."""
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
    """Return the mean absolute difference of two pictures, 0 to 255."""
    return float(np.abs(reference.astype(np.float64) - candidate).mean())


def rmse(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the root mean square difference of two pictures, 0 to 255."""
    return float(np.sqrt(np.mean((reference.astype(np.float64) - candidate) ** 2)))


def flip_map(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return FLIP's error map of two pictures: float32 (height, width), 0 (no difference seen) to 1.

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


def picture_functions(lpips_backbone: Path | None) -> tuple[dict[str, PictureFunction], dict[str, str]]:
    """Return the functions of the picture metrics beside ``flip``, and why metrics cannot be computed here.

    Args:
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.

    Raises:
        MissingExtraError: If scikit-image is not installed.
        RecipeError: If ``lpips_backbone`` is given and is no AlexNet.
    """
    if find_spec("skimage") is None:
        raise MissingExtraError("scikit-image", "eval")
    functions: dict[str, PictureFunction] = {
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
    """Return metric -> reason for those that a picture whose shorter side has this many pixels cannot have."""
    needs = {"ssim": SSIM_MIN_PIXELS, "lpips": LPIPS_MIN_PIXELS}
    return {
        name: f"needs pictures of at least {pixels} pixels each side"
        for name, pixels in needs.items()
        if side < pixels
    }
