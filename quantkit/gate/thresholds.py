"""Thresholds: which metrics are bounded, and on which side of the bounds an interval lies."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Literal

from quantkit.errors import RecipeError
from quantkit.gate.bootstrap import Interval
from quantkit.recipe.schema import Task, Threshold

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]

_PICTURES = {
    "psnr": Threshold(min=20.0),
    "mae": Threshold(max=12.0),
    "image_cosine": Threshold(min=0.98),
    "image_rel_l2": Threshold(max=0.20),
}
_VIDEOS = _PICTURES | {"mae_drift": Threshold(max=6.0)}

DEFAULT_THRESHOLDS: Mapping[Task, Mapping[str, Threshold]] = {
    "t2i": _PICTURES,
    "t2v": _VIDEOS,
    "i2v": _VIDEOS,
    "chat": {"token_agreement": Threshold(min=0.90), "token_kl": Threshold(max=0.10)},
}
"""Used where nothing else is given. Of pictures: the "recommended" bounds of vLLM-Omni's comparison tool; the
others are quantkit's own (docs/compare.md says why)."""


def check_names(thresholds: Collection[str], known: Collection[str], where: str) -> None:
    """Refuse thresholds for metrics that do not exist.

    Args:
        thresholds: Metric names that are bounded.
        known: Metric names that exist.
        where: What the message names as the source, e.g. ``flux.yaml: compare.thresholds``.

    Raises:
        RecipeError: With one problem per unknown name and the closest known one.
    """
    problems = []
    for name in thresholds:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "known metrics: " + ", ".join(sorted(known))
        problems.append(f"{where}: {name}: unknown metric ({hint})")
    if problems:
        raise RecipeError(*problems)


def place(interval: Interval, threshold: Threshold) -> Outcome:
    """Return PASS if the whole interval is within the bounds, FAIL if all of it is beyond one, else INCONCLUSIVE.

    A bound itself belongs to the good side.
    """
    lower = float("-inf") if threshold.min is None else threshold.min
    upper = float("inf") if threshold.max is None else threshold.max
    if lower <= interval.low and interval.high <= upper:
        return "PASS"
    if interval.high < lower or interval.low > upper:
        return "FAIL"
    return "INCONCLUSIVE"


def describe(threshold: Threshold) -> str:
    """Return the bounds as text, e.g. ``≥ 20`` or ``0.1 to 0.3``."""
    if threshold.min is None:
        return f"\N{LESS-THAN OR EQUAL TO} {threshold.max:g}"
    if threshold.max is None:
        return f"\N{GREATER-THAN OR EQUAL TO} {threshold.min:g}"
    return f"{threshold.min:g} to {threshold.max:g}"
