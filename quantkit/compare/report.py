"""``report.html``: one file that shows a comparison, made from the result and the images beside it alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.compare.charts import Mark, steps_chart, swarm_chart
from quantkit.compare.difference import FULL_SCALE
from quantkit.compare.embed import IMAGE_BUDGET_BYTES, embed
from quantkit.compare.metrics import METRICS
from quantkit.compare.numbers import short, times
from quantkit.compare.result import REPORT_FILE, Comparison, Item
from quantkit.compare.summary import sort_metric, worst_first
from quantkit.compare.tables import CAPTION_METRICS, cost_rows, item_rows, other_rows, threshold_rows, tiles
from quantkit.errors import MissingExtraError
from quantkit.gate.thresholds import describe

_SWARM_METRICS = ("flip", "psnr", "latent_rel_l2", "ssim")


def write_report(result: Comparison, folder: Path) -> Path:
    """Write ``report.html`` into the folder that holds the result and its images, and return its path.

    Raises:
        MissingExtraError: If jinja2 is not installed.
        CheckpointError: If an image is missing.
    """
    path = folder / REPORT_FILE
    path.write_text(render(result, folder), encoding="utf-8")
    return path


def render(result: Comparison, folder: Path, *, image_budget_bytes: int = IMAGE_BUDGET_BYTES) -> str:
    """Return the report as one HTML page that refers to nothing outside itself but full-size images beside it.

    Args:
        result: What the comparison found.
        folder: Where the image paths in it begin.
        image_budget_bytes: Bound on the embedded images; the prompts shown are the worst that fit, at least one.

    Raises:
        MissingExtraError: If jinja2 is not installed.
        CheckpointError: If an image is missing.
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
    groups = worst_first(result.items)
    gallery, hidden = _gallery(result, groups, folder, image_budget_bytes)
    return environment.get_template("report.html").render(
        result=result,
        verdict=result.verdict,
        tiles=tiles(result),
        rows=threshold_rows(result),
        others=other_rows(result),
        costs=cost_rows(result.reference, result.candidate),
        curves=_curves(result),
        swarms=_swarms(result),
        gallery=gallery,
        hidden_prompts=hidden,
        sorted_by=METRICS[sort_metric(result.items)].label,
        all_items=item_rows(groups),
        item_columns=list(CAPTION_METRICS.values()),
        full_scale=FULL_SCALE,
        sampling=result.sampling.given(),
        command=shlex.join(result.command),
    )


def _curves(result: Comparison) -> list[dict[str, str]]:
    """Return the two charts of divergence along the steps; none if no image could be scored."""
    if result.latent_rel_l2 is None or result.latent_cosine is None:
        return []
    scored = [item for item in result.items if item.failure is None]
    cosines = result.latent_cosine
    angle = cosines.model_copy(
        update={
            name: tuple(max(0.0, 1 - value) for value in getattr(cosines, source))
            for name, source in {
                "minimum": "maximum", "p10": "p90", "median": "median", "p90": "p10", "maximum": "minimum",
            }.items()
        }
    )  # fmt: skip
    floor = result.noise_floor.latent_rel_l2 if result.noise_floor else ()
    return [
        {
            "title": "Relative L2 distance of the latents",
            "chart": steps_chart(
                "Relative L2 distance of the latents after every step",
                result.latent_rel_l2,
                [Mark(item.latent_rel_l2, _item_label(result, item)) for item in scored],
                floor,
            ),
        },
        {
            "title": "1 \N{MINUS SIGN} cosine of the latents",
            "chart": steps_chart(
                "One minus the cosine of the latents after every step",
                angle,
                [
                    Mark([max(0.0, 1 - value) for value in item.latent_cosine], _item_label(result, item))
                    for item in scored
                ],
            ),
        },
    ]


def _item_label(result: Comparison, item: Item) -> str:
    return f"prompt {item.prompt}, seed {item.seed}: {result.prompts[item.prompt]}"


def _swarms(result: Comparison) -> list[dict[str, str]]:
    """Return one distribution over prompts per metric that is judged or that people look at first."""
    thresholds = {row.metric: row.threshold for row in result.verdict.rows}
    names = dict.fromkeys((*(name for name in thresholds if METRICS[name].kind != "cost"), *_SWARM_METRICS))
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
            Mark([value], f"{metric.label} {short(value)}, prompt {prompt}: {result.prompts[prompt]}")
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


def _gallery(
    result: Comparison, groups: Sequence[Sequence[Item]], folder: Path, budget_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """Return the prompts shown with their images, worst first, and how many there was no room for."""
    shown: list[dict[str, Any]] = []
    used = 0
    for group in groups:
        entries = [_gallery_entry(item, folder) for item in group]
        used += sum(len(image["uri"]) for entry in entries for image in entry["images"] if image["uri"])
        if shown and used > budget_bytes:
            break
        shown.append({"prompt": group[0].prompt, "text": result.prompts[group[0].prompt], "entries": entries})
    return shown, len(groups) - len(shown)


def _gallery_entry(item: Item, folder: Path) -> dict[str, Any]:
    images = []
    for role, name in (
        ("reference", item.reference_image),
        ("candidate", item.candidate_image),
        ("difference", item.difference_image),
    ):
        embedded = embed(folder / name) if name is not None else None
        images.append(
            {
                "role": role,
                "uri": embedded.uri if embedded else "",
                "pixelated": embedded is not None and embedded.pixelated,
            }
        )
    return {"item": item, "images": images, "numbers": _numbers(item.metrics), "failure": item.failure}


def _numbers(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [
        (label, f"{short(metrics[name])} {METRICS[name].unit}".strip())
        for name, label in CAPTION_METRICS.items()
        if name in metrics
    ]
