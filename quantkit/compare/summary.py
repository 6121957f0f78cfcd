"""From the values of every item to distributions per step, means per metric and the worst prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quantkit.compare.metrics import METRICS
from quantkit.compare.result import Item, Spread, Summary, Timing
from quantkit.gate.bootstrap import bootstrap_mean
from quantkit.gate.verdict import prompt_means


def spread(rows: Sequence[Sequence[float]]) -> Spread | None:
    """Return the distribution over the rows at every point, one row per item; None without any value.

    Rows may end early; each point is then described over the rows that reach it.
    """
    longest = max(map(len, rows), default=0)
    if longest == 0:
        return None
    points = [[row[index] for row in rows if len(row) > index] for index in range(longest)]
    quantiles = np.array([np.quantile(np.asarray(point, np.float64), [0, 0.1, 0.5, 0.9, 1]) for point in points])
    minimum, p10, median, p90, maximum = (tuple(map(float, line)) for line in quantiles.T)
    return Spread(minimum=minimum, p10=p10, median=median, p90=p90, maximum=maximum, count=tuple(map(len, points)))


def curve_spreads(items: Sequence[Item]) -> dict[str, Spread]:
    """Return the distribution of every curve over the items that could be scored."""
    scored = [item.curves for item in items if item.failure is None]
    names = dict.fromkeys(name for curves in scored for name in curves)
    found = {name: spread([curves[name] for curves in scored if name in curves]) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def timing(values: Sequence[float]) -> Timing | None:
    """Return the median and the 10 to 90 % range; None without any value."""
    if not values:
        return None
    p10, median, p90 = map(float, np.quantile(values, [0.1, 0.5, 0.9]))
    return Timing(median=median, p10=p10, p90=p90, count=len(values))


def trajectory_metrics(rel_l2: Sequence[float], cosine_distance: Sequence[float]) -> dict[str, float]:
    """Return the trajectory metrics of one item from its values after every step."""
    return {
        "latent_rel_l2": rel_l2[-1],
        "latent_rel_l2_median_over_steps": float(np.median(rel_l2)),
        "latent_rel_l2_max_over_steps": max(rel_l2),
        "latent_cosine": 1 - cosine_distance[-1],
        "latent_cosine_min_over_steps": 1 - max(cosine_distance),
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


def worst_first(items: Sequence[Item], metric: str) -> list[list[Item]]:
    """Return the items grouped by prompt, the worst prompt first and in it the worst seed; failures lead.

    Args:
        items: Of all prompts.
        metric: What decides which is worse.
    """
    sign = -1 if METRICS[metric].better == "higher" else 1

    def badness(item: Item) -> float:
        return sign * item.metrics[metric] if metric in item.metrics else float("inf")

    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)

    def mean_badness(group: list[Item]) -> float:
        return -sum(map(badness, group)) / len(group)

    return [sorted(group, key=badness, reverse=True) for group in sorted(groups.values(), key=mean_badness)]
