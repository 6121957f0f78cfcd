"""``report.html``: one file that shows a comparison, made from the result and the files beside it alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from quantkit.compare.charts import Mark, curve_chart, swarm_chart
from quantkit.compare.difference import FULL_SCALE
from quantkit.compare.gallery import BUDGET_BYTES, gallery
from quantkit.compare.kinds import KINDS, Kind
from quantkit.compare.metrics import CURVES, METRICS
from quantkit.compare.numbers import short, times
from quantkit.compare.result import REPORT_FILE, Comparison, Item
from quantkit.compare.summary import worst_first
from quantkit.compare.tables import cost_rows, item_rows, other_rows, threshold_rows, tiles
from quantkit.errors import MissingExtraError
from quantkit.gate.thresholds import describe


def write_report(result: Comparison, folder: Path) -> Path:
    """Write ``report.html`` into the folder that holds the result and its images or videos, and return its path.

    Raises:
        MissingExtraError: If jinja2 is not installed.
        CheckpointError: If an image or frame is missing.
    """
    path = folder / REPORT_FILE
    path.write_text(render(result, folder), encoding="utf-8")
    return path


def render(result: Comparison, folder: Path, *, budget_bytes: int = BUDGET_BYTES) -> str:
    """Return the report as one HTML page that refers to nothing outside itself but the files beside it.

    Args:
        result: What the comparison found.
        folder: Where the paths in it begin.
        budget_bytes: Bound on the embedded pictures; the prompts shown are the worst that fit, at least one.

    Raises:
        MissingExtraError: If jinja2 is not installed.
        CheckpointError: If an image or frame is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "eval") from error

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.compare", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(short=short, times=times)
    kind = KINDS[result.task]
    sort_metric = kind.sort_metric(result.items)
    groups = worst_first(result.items, sort_metric)
    shown, hidden = gallery(result, groups, folder, budget_bytes)
    return environment.get_template("report.html").render(
        result=result,
        verdict=result.verdict,
        tiles=tiles(result),
        rows=threshold_rows(result),
        others=other_rows(result),
        costs=cost_rows(result.reference, result.candidate, kind),
        kind=kind,
        path_curves=_curves(result, kind.path),
        frame_curves=_curves(result, kind.frames),
        floor=_floor(result, kind),
        swarms=_swarms(result, kind),
        gallery=shown,
        hidden_prompts=hidden,
        sorted_by=METRICS[sort_metric].label,
        all_items=item_rows(groups, kind),
        item_columns=list(kind.captions.values()),
        full_scale=FULL_SCALE[result.difference_map],
        sampling=result.sampling.given(),
        setup=_setup(result),
        command=shlex.join(result.command),
    )


def _setup(result: Comparison) -> str:
    """Return how much was made of each prompt, in words."""
    sampling = result.sampling
    parts = []
    if result.timesteps:
        parts.append(f"{len(result.timesteps)} steps")
    if sampling.width and sampling.height:
        frames = f"{sampling.num_frames} frames of " if sampling.num_frames else ""
        parts.append(f"{frames}{sampling.width} \N{MULTIPLICATION SIGN} {sampling.height} pixels")
    if sampling.max_new_tokens:
        parts.append(f"greedy, at most {sampling.max_new_tokens} tokens")
    return ", ".join(parts)


def _curves(result: Comparison, names: Sequence[str]) -> list[dict[str, str]]:
    """Return a chart per curve that could be measured."""
    scored = [item for item in result.items if item.failure is None]
    floor = result.noise_floor.curves if result.noise_floor else {}
    charts = []
    for name in names:
        if name not in result.curves:
            continue
        curve = CURVES[name]
        marks = [Mark(item.curves[name], _item_label(result, item)) for item in scored if name in item.curves]
        charts.append(
            {
                "title": curve.label + (f" ({curve.unit})" if curve.unit else ""),
                "chart": curve_chart(curve, result.curves[name], marks, floor.get(name, ())),
            }
        )
    return charts


def _floor(result: Comparison, kind: Kind) -> float | None:
    """Return how far the reference is from itself at most, None if that was not measured."""
    return max(result.noise_floor.curves[kind.path[0]]) if result.noise_floor else None


def _item_label(result: Comparison, item: Item) -> str:
    return f"prompt {item.prompt}, seed {item.seed}: {result.prompts[item.prompt].text}"


def _swarms(result: Comparison, kind: Kind) -> list[dict[str, str]]:
    """Return one distribution over prompts per metric that is judged or that people look at first."""
    thresholds = {row.metric: row.threshold for row in result.verdict.rows}
    judged = [name for name in thresholds if METRICS[name].kind != "cost"]
    names = dict.fromkeys((*judged, *kind.swarms))
    swarms = []
    for name in names:
        per_prompt: dict[int, list[float]] = {}
        for item in result.items:
            if name in item.metrics:
                per_prompt.setdefault(item.prompt, []).append(item.metrics[name])
        if not per_prompt:
            continue
        metric = METRICS[name]
        means = {prompt: sum(values) / len(values) for prompt, values in per_prompt.items()}
        dots = [
            Mark([value], f"{metric.label} {short(value)}, prompt {prompt}: {result.prompts[prompt].text}")
            for prompt, value in means.items()
        ]
        chart = swarm_chart(
            f"{metric.label} per prompt",
            dots,
            result.metrics[name].value,
            thresholds.get(name),
            (metric.low, metric.high),
        )
        direction = f"{metric.better} is better"
        swarms.append(
            {
                "title": metric.label + (f" ({metric.unit})" if metric.unit else ""),
                "note": direction + (f"; wanted {describe(thresholds[name])}" if name in thresholds else ""),
                "chart": chart,
            }
        )
    return swarms
