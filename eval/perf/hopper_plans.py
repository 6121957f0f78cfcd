"""Time of every way in which the Hopper kernel can share a layer's work, and the model that chooses among them.

::

    python eval/perf/hopper_plans.py --output plans.json        # measure, then fit; about two minutes
    python eval/perf/hopper_plans.py --fit plans.json           # fit again

Times are those of a call inside a CUDA graph, the plans of a row replayed in turn. The model is
`quantkit_runtime.kernels.hopper_launch.Model`: what is printed at the end can be put in the place of its ``MODEL``.
``regret`` is by how much the plan that a model chooses takes longer than the best one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measuring import Budget, Column, Report, common_options, numbers, time_graphs, warm_up
from quantkit_runtime.kernels import hopper_launch, ops
from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.kernels.hopper_launch import MODEL, STAGES, Model, Plan
from quantkit_runtime.kernels.tiles import SLICE, TILE

SHAPES = ((3072, 3072), (3072, 12288), (12288, 3072), (5120, 13824))
ROWS = (64, 128, 256, 512, 1024, 2048, 4608)
_COPIES = 4
_UNEQUAL = tuple(1 + hundredths / 100 for hundredths in range(31))
_COLUMNS = (
    Column("shape", "K x N", "", 13),
    Column("rows", "rows", "d", 6),
    Column("block", "block", "d", 6),
    Column("rounds", "rounds", "d", 7),
    Column("shared", "shared", "d", 7),
    Column("sharers", "sharers", "d", 8),
    Column("median_us", "us", ".1f", 9),
    Column("model_us", "model", ".1f", 9),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, fit the model and write JSON."""
    parser = common_options(__doc__)
    parser.add_argument("--rows", type=numbers, default=list(ROWS), help="default: 64 to 4608")
    parser.add_argument("--fit", type=Path, help="JSON of an earlier run; nothing is measured")
    options = parser.parse_args(arguments)
    if options.fit:
        measured = json.loads(options.fit.read_text(encoding="utf-8"))["rows"]
    else:
        device = torch.device(options.device)
        if not hopper_launch.runs_on(device):
            parser.error(f"the kernel runs on NVIDIA's Hopper GPUs; this is {device}")
        report = Report("plans of the Hopper kernel", _COLUMNS, options, _chart)
        measured = list(_measure(device, options, report))
        report.save()
    for name, model in (("in use", MODEL), ("fitted", fitted(measured))):
        regrets = regret(measured, model)
        print(f"{name}: regret {statistics.mean(regrets):.2%} in the mean, {max(regrets):.2%} at most; {model}")


@torch.no_grad()
def _measure(device: torch.device, options: Any, report: Report) -> Iterable[dict[str, Any]]:
    """Yield and report the time of every plan."""
    budget, count = Budget(options.budget_s), multiprocessors(device)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)  # Triton launches on the current one
    torch.manual_seed(options.seed)
    for in_features, out_features in SHAPES:
        tiles = in_features // TILE
        layers = [
            (
                torch.randint(-(2**31), 2**31 - 1, (tiles, out_features, SLICE), dtype=torch.int32, device=device),
                torch.rand(tiles, out_features, device=device).to(torch.float16),
                ops.counters_for(out_features, device),
            )
            for _ in range(_COPIES)
        ]
        for rows in options.rows:
            if budget.spent:
                return
            x = torch.randn(rows, in_features, device=device).to(torch.bfloat16)
            variants = {
                plan: [
                    partial(hopper_launch.multiply, x, words, scales, None, None, flags, TILE, plan)
                    for words, scales, flags in layers
                ]
                for block in STAGES
                for plan in hopper_launch.plans(block, rows, out_features, tiles, count, count)
            }
            for calls in variants.values():
                warm_up(calls, device)
            named = {str(plan): calls for plan, calls in variants.items()}
            times = time_graphs(named, seconds=options.row_s)
            for plan in variants:
                row = {
                    "shape": f"{in_features}x{out_features}", "rows": rows, **vars(plan),
                    "median_us": times[str(plan)].median_ms * 1e3, "model_us": MODEL.time_us(plan, tiles),
                }  # fmt: skip
                report.add(row)
                yield row


def _chart(rows: list[dict[str, Any]]) -> tuple[str, list[str], dict[str, dict[str, float]]]:
    """Plot the best plan of each layer over rows."""
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        best = series.setdefault(row["shape"], {})
        best[str(row["rows"])] = min(best.get(str(row["rows"]), float("inf")), row["median_us"] / 1e3)
    return "rows, best plan", list(dict.fromkeys(str(row["rows"]) for row in rows)), series


def _plan(row: dict[str, Any]) -> tuple[Plan, int]:
    """Return the plan of a row, and the tiles of its layer."""
    names = ("block", "rounds", "shared", "sharers", "programs")
    return Plan(*(row[name] for name in names)), int(row["shape"].split("x")[0]) // TILE


def fitted(measured: Sequence[dict[str, Any]]) -> Model:
    """Return the model with the least squares of relative errors.

    But for ``unequal``, of which every hundredth is tried, the times are linear in what is sought.
    """
    times = torch.tensor([row["median_us"] for row in measured], dtype=torch.float64)
    blocks = list(STAGES)

    def model(values: list[float], unequal: float) -> Model:
        tile_us, part_us, sum_us = (
            dict(zip(blocks, values[at : at + len(blocks)], strict=True))
            for at in range(0, 3 * len(blocks), len(blocks))
        )
        return Model(tile_us, part_us, sum_us, values[-1], unequal)

    best = (float("inf"), MODEL)
    for unequal in _UNEQUAL:
        # What one microsecond of each makes.
        units = [model(unit, unequal) for unit in torch.eye(3 * len(blocks) + 1).tolist()]
        columns = [[unit.time_us(*_plan(row)) for row in measured] for unit in units]
        weighted = (torch.tensor(columns, dtype=torch.float64) / times).T
        values = torch.linalg.lstsq(weighted, torch.ones_like(times)[:, None]).solution[:, 0]
        squares = float((weighted @ values - 1).square().sum())
        best = min(best, (squares, model(values.tolist(), unequal)), key=lambda pair: pair[0])
    return best[1]


def regret(measured: Sequence[dict[str, Any]], model: Model) -> list[float]:
    """Return, for each layer and number of rows, by how much the model's choice takes longer than the best plan."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in measured:
        cells.setdefault((row["shape"], row["rows"]), []).append(row)
    return [
        min(rows, key=lambda row: model.time_us(*_plan(row)))["median_us"]
        / min(row["median_us"] for row in rows) - 1
        for rows in cells.values()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
