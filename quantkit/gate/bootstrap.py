"""Confidence interval of a mean by the bias-corrected and accelerated (BCa) bootstrap.

Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987); the jackknife acceleration is formula 6.6 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.90
RESAMPLES = 9999
SEED = 20_260_101
_CHUNK_ELEMENTS = 4_000_000  # bounds the memory of one batch of resamples to about 64 MB


class Interval(NamedTuple):
    """A mean with its confidence interval; low == mean == high where nothing varies."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Return the mean of independent values and its two-sided BCa interval.

    One value, or values that are all equal, say nothing about spread: the interval is then the mean alone.

    Args:
        values: One finite value per independent unit (here: per prompt).
        confidence: Coverage of the interval, in (0, 1).
        resamples: Bootstrap resamples.
        seed: Seed of the resampling; the same values and seed give the same interval.

    Raises:
        ValueError: If there is no value or one that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError("bootstrap_mean needs at least one value, all of them finite")
    mean = float(data.mean())
    scale = float(np.abs(data - mean).max())
    if data.min() == data.max() or scale == 0:
        return Interval(float(data[0]), float(data[0]), float(data[0]))

    centred = (data - mean) / scale  # of order 1, so that no power below leaves the range of floats
    replicates = _resampled_means(centred, resamples, seed)
    # Means that differ from the sample's own by rounding alone are ties, which count half.
    tie = 1e-12
    below = np.count_nonzero(replicates < -tie) + 0.5 * np.count_nonzero(np.abs(replicates) <= tie)
    share_below = min(max(below / resamples, 0.5 / resamples), 1 - 0.5 / resamples)
    normal = NormalDist()
    bias = normal.inv_cdf(share_below)

    influence = centred / (data.size - 1)
    acceleration = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))

    def corrected(probability: float) -> float:
        shifted = bias + normal.inv_cdf(probability)
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [corrected(tail), corrected(1 - tail)])
    # A strongly skewed sample can put both corrected quantiles on one side; the mean stays inside its interval.
    return Interval(mean, mean + scale * min(float(low), 0.0), mean + scale * max(float(high), 0.0))


def _resampled_means(data: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // data.size)
    means = [
        data[generator.integers(data.size, size=(min(rows, resamples - start), data.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
