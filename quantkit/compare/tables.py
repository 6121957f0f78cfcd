"""The tables of the report: rows of text, one function per table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.compare.charts import interval_chart
from quantkit.compare.kinds import KINDS, Kind
from quantkit.compare.metrics import METRICS
from quantkit.compare.numbers import milliseconds, seconds, short, size, times
from quantkit.compare.result import Comparison, Item, ModelSide
from quantkit.gate.thresholds import describe
from quantkit.gate.verdict import FEW_PROMPTS, Row

# Weights that take this much more than their files are not packed any more.
_UNPACKED_RATIO = 1.1
_ABSENT = "\N{EM DASH}"


def tiles(result: Comparison) -> list[dict[str, str]]:
    """Return the four numbers that a reader wants first."""
    tiles = []
    kind = KINDS[result.task]
    for name in (kind.headline, kind.sort_metric(result.items)):
        if name in result.metrics:
            metric, summary = METRICS[name], result.metrics[name]
            tiles.append(
                {
                    "label": metric.label,
                    "value": short(summary.value),
                    "note": f"90 % interval {short(summary.low)} to {short(summary.high)}",
                }
            )
    ours, theirs = (sum(side.disk_bytes.values()) for side in (result.reference, result.candidate))
    tiles.append(
        {
            "label": "Size on disk",
            "value": times(theirs / ours),
            "note": f"{size(theirs)} instead of {size(ours)}",
        }
    )
    if result.reference.step_ms and result.candidate.step_ms:
        before, after = result.reference.step_ms.median, result.candidate.step_ms.median
        tiles.append(
            {
                "label": f"Time per {kind.step}",
                "value": times(after / before),
                "note": f"{milliseconds(after)} instead of {milliseconds(before)}" + doubt_times(result),
            }
        )
    return tiles


def doubt_times(result: Comparison) -> str:
    """Return what to add to a ratio of step times if they vary too much for it; else nothing."""
    sides = (result.reference.step_ms, result.candidate.step_ms)
    return "" if all(side is None or side.steady for side in sides) else ", but the times vary widely"


def interval_of(row: Row) -> str:
    """Return the interval of a row as text; empty where there is none, as of a single prompt."""
    if row.low is None or row.high is None or row.prompts < 2:
        return ""
    return f"{short(row.low)} to {short(row.high)}"


def threshold_rows(result: Comparison) -> list[dict[str, Any]]:
    """Return one row per threshold, each with its interval as a chart."""
    rows = []
    for row in result.verdict.rows:
        metric = METRICS[row.metric]
        measured = row.value is not None and row.low is not None and row.high is not None
        rows.append(
            {
                "name": row.metric,
                "metric": metric,
                "outcome": row.outcome,
                "threshold": describe(row.threshold),
                "value": short(row.value) if row.value is not None else _ABSENT,
                "interval": interval_of(row),
                "chart": (
                    interval_chart(
                        f"{metric.label}: {row.reason}", row.value or 0, row.low or 0, row.high or 0, row.threshold
                    )
                    if measured
                    else ""
                ),
                "note": row.reason if needs_words(row) else "",
            }
        )
    return rows


def needs_words(row: Row) -> bool:
    """Return whether the numbers beside a verdict do not already say all of it."""
    return row.outcome == "INCONCLUSIVE" or row.value is None or row.prompts < FEW_PROMPTS


def other_rows(result: Comparison) -> list[dict[str, Any]]:
    """Return one row per metric that no threshold bounds, and for those that could not be measured the reason."""
    judged = {row.metric for row in result.verdict.rows}
    return [
        {
            "name": name,
            "metric": metric,
            "value": short(result.metrics[name].value) if name in result.metrics else "unavailable",
            "interval": (
                f"{short(result.metrics[name].low)} to {short(result.metrics[name].high)}"
                if name in result.metrics
                else result.unavailable[name]
            ),
            "available": name in result.metrics,
        }
        for name, metric in METRICS.items()
        if name not in judged and (name in result.metrics or name in result.unavailable)
    ]


def cost_rows(reference: ModelSide, candidate: ModelSide, kind: Kind) -> list[dict[str, Any]]:
    """Return what both models cost, one row per quantity; the ratio is candidate over reference."""

    def row(label: str, ours: float | None, theirs: float | None, text: Any, note: str = "") -> dict[str, Any]:
        return {
            "label": label,
            "reference": _ABSENT if ours is None else text(ours),
            "candidate": _ABSENT if theirs is None else text(theirs),
            "ratio": theirs / ours if ours and theirs is not None else None,
            "note": note,
        }

    def spread(side: ModelSide) -> str:
        timing = side.step_ms
        return f"{milliseconds(timing.p10)} to {milliseconds(timing.p90)}" if timing else ""

    rows = [
        row("On disk", sum(reference.disk_bytes.values()), sum(candidate.disk_bytes.values()), size),
        *(
            row(f"\N{EN DASH} {name}", reference.disk_bytes.get(name), candidate.disk_bytes.get(name), size, note)
            for name, note in candidate.quantization.items()
        ),
    ]
    held, stored = sum(candidate.weight_bytes.values()), sum(candidate.disk_bytes.values())
    unpacked = "kernels keep unpacked copies for speed" if held > _UNPACKED_RATIO * stored else ""
    ours, theirs = reference.step_ms, candidate.step_ms
    both = f"10 to 90 %: {spread(reference)}; {spread(candidate)}"
    rows += [
        row("Weights in memory", sum(reference.weight_bytes.values()), held, size, unpacked),
        row(
            "Peak memory",
            reference.peak_memory_bytes,
            candidate.peak_memory_bytes,
            size,
            candidate.peak_memory_note,
        ),
        row(
            f"Time per {kind.step}, median",
            ours.median if ours else None,
            theirs.median if theirs else None,
            milliseconds,
            both if ours and theirs else f"too few {kind.step}s to time",
        ),
        row(f"Time per {kind.output}, median", reference.output_s.median, candidate.output_s.median, seconds),
        row("Time to load", reference.load_s, candidate.load_s, seconds),
    ]
    return rows


def item_rows(groups: Sequence[Sequence[Item]], kind: Kind) -> list[dict[str, Any]]:
    """Return one row per item in the order of the gallery."""
    return [
        {
            "item": item,
            "values": [short(item.metrics[name]) if name in item.metrics else _ABSENT for name in kind.captions],
        }
        for group in groups
        for item in group
    ]
