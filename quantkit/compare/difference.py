"""Where two images differ, as a picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantkit.compare.pictures import flip_map, why_no_flip

# Every 16th entry of matplotlib's perceptually uniform "magma" (CC0), which FLIP's own tools use as well.
_MAGMA = np.array(
    [
        (0, 0, 4), (11, 9, 36), (32, 17, 75), (59, 15, 112), (87, 21, 126), (114, 31, 129), (140, 41, 129),
        (168, 50, 125), (196, 60, 117), (222, 73, 104), (241, 96, 93), (250, 127, 94), (254, 159, 109),
        (254, 191, 132), (253, 222, 160), (252, 253, 191),
    ],
    dtype=np.float64,
)  # fmt: skip

FULL_SCALE: Mapping[str, float] = {"FLIP": 0.5, "absolute error": 0.2}
"""Difference that gets the lightest colour; a fixed scale keeps maps comparable, and most differences are small."""


def map_name() -> str:
    """Return what `difference_map` shows here: ``FLIP``, or ``absolute error`` without flip-evaluator."""
    return "FLIP" if why_no_flip() is None else "absolute error"


def absolute_error(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference over the channels, float32 (..., height, width), 0 to 1.

    Args:
        reference: uint8 (..., height, width, 3).
        candidate: Likewise.
    """
    error: np.ndarray = np.abs(reference.astype(np.float32) - candidate).mean(axis=-1) / 255
    return error


def difference_map(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return where two uint8 images (height, width, 3) differ, float (height, width), 0 to 1."""
    if why_no_flip() is None:
        return flip_map(reference, candidate)
    return absolute_error(reference, candidate)


def paint(values: np.ndarray, name: str) -> np.ndarray:
    """Return a difference (..., height, width) as uint8 colours (..., height, width, 3), black to light yellow.

    Args:
        values: The difference, 0 to 1.
        name: What it is, a key of `FULL_SCALE`.
    """
    position = np.clip(values / FULL_SCALE[name], 0, 1) * (len(_MAGMA) - 1)
    knots = np.arange(len(_MAGMA))
    channels = [np.interp(position, knots, _MAGMA[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
