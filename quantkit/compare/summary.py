"""From the values of every item to distributions per step, means per metric and the worst prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantkit.compare.result import Item, Spread, Summary, Timing
from quantkit.gate.bootstrap import bootstrap_mean
from quantkit.gate.verdict import prompt_means

# What the eye sees decides which prompt is the worst; FLIP where it could be computed.
_SORT_METRICS = ("flip", "mae")


def spread(rows: Sequence[Sequence[float]]) -> Spread | None:
    """Return the distribution per step over the rows, one row per item; None without any row."""
    if not rows:
        return None
    minimum, p10, median, p90, maximum = (
        tuple(map(float, line)) for line in np.quantile(np.asarray(rows, np.float64), [0, 0.1, 0.5, 0.9, 1], axis=0)
    )
    return Spread(minimum=minimum, p10=p10, median=median, p90=p90, maximum=maximum)


def timing(values: Sequence[float]) -> Timing | None:
    """Return the median and the 10 to 90 % range; None without any value."""
    if not values:
        return None
    p10, median, p90 = map(float, np.quantile(values, [0.1, 0.5, 0.9]))
    return Timing(median=median, p10=p10, p90=p90, count=len(values))


def trajectory_metrics(rel_l2: Sequence[float], cosines: Sequence[float]) -> dict[str, float]:
    """Return the trajectory metrics of one item from its values after every step."""
    return {
        "latent_rel_l2": rel_l2[-1],
        "latent_rel_l2_median_over_steps": float(np.median(rel_l2)),
        "latent_rel_l2_max_over_steps": max(rel_l2),
        "latent_cosine": cosines[-1],
        "latent_cosine_min_over_steps": min(cosines),
    }


def by_metric(items: Sequence[Item]) -> dict[str, list[list[float]]]:
    """Return metric -> one list per prompt with its value for each seed, over the items that did not fail."""
    groups: dict[str, dict[int, list[float]]] = {}
    for item in items:
        for name, value in item.metrics.items():
            groups.setdefault(name, {}).setdefault(item.prompt, []).append(value)
    return {name: list(per_prompt.values()) for name, per_prompt in groups.items()}


def summaries(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Summary]:
    """Return mean and 90 % interval over prompts of every metric."""
    result = {}
    for name, per_prompt in values.items():
        interval = bootstrap_mean(prompt_means(per_prompt))
        result[name] = Summary(value=interval.mean, low=interval.low, high=interval.high)
    return result


def sort_metric(items: Sequence[Item]) -> str:
    """Return the metric by which prompts are sorted, worst first."""
    return next((name for name in _SORT_METRICS if any(name in item.metrics for item in items)), _SORT_METRICS[-1])


def worst_first(items: Sequence[Item]) -> list[list[Item]]:
    """Return the items grouped by prompt, the worst prompt first and in it the worst seed; failures lead."""
    metric = sort_metric(items)

    def badness(item: Item) -> float:
        return item.metrics.get(metric, float("inf"))

    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)

    def mean_badness(group: list[Item]) -> Any:
        return -sum(map(badness, group)) / len(group)

    return [sorted(group, key=badness, reverse=True) for group in sorted(groups.values(), key=mean_badness)]
