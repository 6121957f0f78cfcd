"""Differences of two videos: how single frames differ, and how the change from frame to frame does.

A video is a uint8 array (frames, height, width, 3). Every function takes the reference first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from quantkit.compare.pictures import PictureFunction

SAMPLED_FRAMES = 8
"""Frames of a video on which the slow metrics (FLIP, LPIPS) are computed, evenly spaced, the ends among them."""


def frame_values(
    functions: Mapping[str, PictureFunction], reference: np.ndarray, candidate: np.ndarray
) -> dict[str, list[float]]:
    """Return metric -> its value for every frame."""
    return {
        name: [function(*pair) for pair in zip(reference, candidate, strict=True)]
        for name, function in functions.items()
    }


def sampled(count: int, most: int = SAMPLED_FRAMES) -> list[int]:
    """Return at most this many indices of frames, evenly spaced from the first to the last."""
    return [int(index) for index in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def over_frames(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the metrics of a video from ``psnr``, ``ssim``, ``mae`` ... of every frame: mean, worst and drift.

    Drift is the mean of the last quarter of the frames minus that of the first quarter, at least one frame each.
    """
    result = {name: float(np.mean(row)) for name, row in values.items()}
    for name in ("psnr", "ssim"):
        if name in values:
            result[f"{name}_min_over_frames"] = float(min(values[name]))
    for name in ("psnr", "ssim", "mae"):
        if name in values:
            quarter = max(1, len(values[name]) // 4)
            result[f"{name}_drift"] = float(np.mean(values[name][-quarter:]) - np.mean(values[name][:quarter]))
    return result


def motion_errors(reference: np.ndarray, candidate: np.ndarray) -> list[float]:
    """Return for every frame but the first how much the change since the frame before differs, 0 to 510 of 255.

    That is the mean over pixels of |(c[t] - c[t-1]) - (r[t] - r[t-1])|: 0 wherever the candidate is off by the same
    picture in every frame, large where it flickers and the reference does not.
    """
    return [
        float(np.abs(ours - theirs).mean())
        for ours, theirs in zip(_changes(reference), _changes(candidate), strict=True)
    ]


def steadiness(video: np.ndarray) -> float:
    """Return 1 - mean |difference of consecutive frames| / 255; 1 for a still."""
    return 1.0 - float(np.mean([np.abs(change).mean() for change in _changes(video)])) / 255


def _changes(video: np.ndarray) -> Iterator[np.ndarray]:
    for before, after in itertools.pairwise(video):
        yield after.astype(np.float32) - before
