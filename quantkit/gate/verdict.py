"""The verdict of a comparison: one row per threshold, and what they say together.

The independent unit is the prompt: seeds of one prompt are averaged first, then the mean over prompts gets a
90 % interval. A row passes or fails only if its whole interval lies on one side of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from quantkit.gate.bootstrap import Interval, bootstrap_mean
from quantkit.gate.thresholds import Outcome, describe, place
from quantkit.recipe.schema import Threshold

FEW_PROMPTS = 8
"""Below this many prompts a bootstrap interval is too narrow to be taken at its word; rows then say so."""

_MANY_MORE = 10_000


class Row(BaseModel):
    """What one threshold says.

    Attributes:
        metric: Name of the metric.
        threshold: Its bounds.
        outcome: PASS, FAIL or INCONCLUSIVE.
        value: Mean over prompts of the means over seeds; None if it could not be measured.
        low: Lower end of the 90 % interval of that mean.
        high: Upper end.
        prompts: Prompts that went in.
        reason: One sentence that explains the outcome.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str
    threshold: Threshold
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    prompts: int
    reason: str


class Verdict(BaseModel):
    """What all thresholds say together.

    Attributes:
        outcome: FAIL if any row fails or something was not finite, else INCONCLUSIVE if any row is, else PASS.
        reason: One sentence.
        rows: One per threshold, in the order given.
        failures: What makes the comparison fail whatever the thresholds say, e.g. latents that are not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Outcome
    reason: str
    rows: tuple[Row, ...]
    failures: tuple[str, ...]


def prompt_means(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over the seeds of every prompt; equal values keep their exact value."""
    return [row[0] if min(row) == max(row) else math.fsum(row) / len(row) for row in values]


def judge(
    values: Mapping[str, Sequence[Sequence[float]]],
    thresholds: Mapping[str, Threshold],
    *,
    unavailable: Mapping[str, str] | None = None,
    failures: Sequence[str] = (),
) -> Verdict:
    """Hold measured values against thresholds.

    Args:
        values: For every metric, one list per prompt with its value for each seed; finite.
        thresholds: Bounds per metric; every name is in ``values`` or in ``unavailable``.
        unavailable: Metrics that could not be measured, with the reason; their rows are INCONCLUSIVE.
        failures: Findings that fail the comparison by themselves; no row can then pass.

    Raises:
        ValueError: If there is no threshold, or its metric is neither measured nor said to be unavailable.
    """
    if not thresholds:
        raise ValueError("no threshold, no verdict")
    unavailable = unavailable or {}
    rows = []
    for metric, threshold in thresholds.items():
        if failures:
            rows.append(_unmeasured(metric, threshold, "FAIL", f"not scored: {failures[0]}"))
        elif metric in unavailable:
            rows.append(_unmeasured(metric, threshold, "INCONCLUSIVE", f"not measured: {unavailable[metric]}"))
        elif metric in values:
            rows.append(_judge_one(metric, threshold, prompt_means(values[metric])))
        else:
            raise ValueError(f"no value for the metric {metric}")
    return _together(rows, tuple(failures))


def _unmeasured(metric: str, threshold: Threshold, outcome: Outcome, reason: str) -> Row:
    return Row(
        metric=metric,
        threshold=threshold,
        outcome=outcome,
        value=None,
        low=None,
        high=None,
        prompts=0,
        reason=reason,
    )


def _judge_one(metric: str, threshold: Threshold, means: Sequence[float]) -> Row:
    interval = bootstrap_mean(means)
    outcome = place(interval, threshold)
    return Row(
        metric=metric,
        threshold=threshold,
        outcome=outcome,
        value=interval.mean,
        low=interval.low,
        high=interval.high,
        prompts=len(means),
        reason=_explain(interval, threshold, outcome, len(means)),
    )


def _explain(interval: Interval, threshold: Threshold, outcome: Outcome, prompts: int) -> str:
    bounds = describe(threshold)
    if prompts == 1:
        side = "meets" if outcome == "PASS" else "misses"
        return f"{interval.mean:.4g} {side} {bounds}; single prompt: no interval"
    span = f"[{interval.low:.4g}, {interval.high:.4g}]"
    caution = f"; only {prompts} prompts: the interval is rough" if prompts < FEW_PROMPTS else ""
    if outcome == "PASS":
        return f"90 % interval {span} is within {bounds}{caution}"
    if outcome == "FAIL":
        return f"90 % interval {span} is wholly outside {bounds}{caution}"
    return f"90 % interval {span} straddles {bounds}; {_advice(more_prompts(interval, threshold, prompts))}"


def _advice(more: int | None) -> str:
    if more is None:
        return "the mean sits on the threshold: more prompts are unlikely to decide"
    return f"about {more} more prompt{'s' if more > 1 else ''} would probably decide"


def more_prompts(interval: Interval, threshold: Threshold, prompts: int) -> int | None:
    """Estimate how many more prompts would move the whole interval to one side of the bounds.

    The half width shrinks with the square root of the number of prompts while the mean stays where it is.

    Returns:
        The estimate, at least 1; None if it is beyond 10 000.
    """
    needed = prompts
    for bound in (threshold.min, threshold.max):
        if bound is None or not interval.low <= bound <= interval.high:
            continue
        distance = abs(interval.mean - bound)
        reach = interval.mean - interval.low if bound <= interval.mean else interval.high - interval.mean
        if distance * math.sqrt(_MANY_MORE) <= reach:
            return None
        needed = max(needed, math.ceil(prompts * (reach / distance) ** 2))
    more = max(needed - prompts, 1)
    return more if more <= _MANY_MORE else None


def _together(rows: Sequence[Row], failures: tuple[str, ...]) -> Verdict:
    total = len(rows)
    failed = [row for row in rows if row.outcome == "FAIL"]
    undecided = [row for row in rows if row.outcome == "INCONCLUSIVE"]
    outcome: Outcome
    if failures:
        outcome, reason = "FAIL", failures[0]
    elif failed:
        outcome = "FAIL"
        reason = f"{_count(len(failed), total)} missed: " + "; ".join(
            f"{row.metric} {row.value:.4g} (wanted {describe(row.threshold)})" for row in failed
        )
    elif undecided:
        outcome = "INCONCLUSIVE"
        reason = f"{_count(len(undecided), total)} undecided: {undecided[0].metric}: {undecided[0].reason}"
    else:
        outcome = "PASS"
        reason = "the one threshold is met" if total == 1 else f"all {total} thresholds are met"
    return Verdict(outcome=outcome, reason=reason, rows=tuple(rows), failures=failures)


def _count(part: int, total: int) -> str:
    return f"{part} of {total} threshold{'s' if total > 1 else ''}"
