"""One denoising step of a diffusion transformer in every variant, mode and size: what the step scripts share."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import measuring
import random_weights
from measuring import Budget, Column, Report
from quantkit_runtime import W4A16Linear
from quantkit_runtime.format import dequantize
from quantkit_runtime.graphs import CudaGraph, record_calls

VARIANTS = {"bf16": None, "w4a16": "16bit", "fp8": "fp8"}
"""Compute mode of the packed layers, None where no layer is packed."""
MODES = ("eager", "graph", "compiled", "compiled-graph")
"""Whether blocks are compiled, and whether the call is recorded as a CUDA graph and replayed."""
DTYPE = torch.bfloat16
_ERROR_ROWS = (1, 16, 2048)
_COMPARED_ROWS = 16
_INPUTS = 2

_COLUMNS = (
    Column("size", "size", width=14),
    Column("batch", "batch", width=6),
    Column("tokens", "tokens", width=8),
    Column("variant", "variant", width=9),
    Column("mode", "mode", width=16),
    Column("median_ms", "ms", ".1f", 9),
    Column("p10_ms", "10 %", ".1f", 9),
    Column("p90_ms", "90 %", ".1f", 9),
    Column("ratio", "to bf16", ".3f", 9),
    Column("peak_gb", "peak GB", ".2f", 9),
    Column("peak_ratio", "to bf16", ".3f", 9),
    Column("stored_gb", "stored GB", ".2f", 11),
    Column("difference", "rel. diff.", ".2e", 12),
    Column("first_call_s", "1st call s", ".1f", 12),
    Column("note", "", width=0),
)


@dataclass(frozen=True)
class Case:
    """Inputs of one step.

    Attributes:
        size: Pixels, as the table shows them.
        batch: Images or videos.
        tokens: Of the picture, per image or video.
        inputs: Makes the keyword arguments of the transformer.
    """

    size: str
    batch: int
    tokens: int
    inputs: Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A diffusion transformer.

    Attributes:
        name: For headings.
        build: Makes it on the meta device.
        blocks: Names of its lists of blocks; every Linear in them is packed.
        mend: Computes the buffers that are not stored.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: tuple[str, ...]
    mend: Callable[[nn.Module], None] = lambda _model: None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add which rows to measure."""
    parser.add_argument(
        "--variants", type=measuring.choices(*VARIANTS), default=list(VARIANTS), help="of bf16,w4a16,fp8"
    )
    parser.add_argument(
        "--modes", type=measuring.choices(*MODES), default=list(MODES), help=f"of {','.join(MODES)}"
    )


@torch.no_grad()
def run(architecture: Architecture, cases: Sequence[Case], options: argparse.Namespace) -> Report:
    """Measure all rows that the options ask for, variant after variant in this process."""
    device = torch.device(options.device)
    budget = Budget(options.budget_s)
    report = Report(f"{architecture.name}, one denoising step", _COLUMNS, options, _chart)
    outputs: dict[tuple[bool, Case], Tensor] = {}
    for variant in options.variants:
        compute = VARIANTS[variant]
        if budget.spent:
            _skip(report, variant, options.modes, cases, "no time left")
            continue
        measuring.reset_peak(device)
        budget.log(f"{variant}: making the model")
        try:
            model = _model(architecture, compute, device, options)
        except Exception as error:  # noqa: BLE001  a variant that fails must not take the others with it
            _skip(report, variant, options.modes, cases, measuring.reason(error))
            measuring.release(device)
            continue
        stored = random_weights.stored_bytes(model) / 1e9
        peak = measuring.peak_bytes(device)
        backends = sorted({str(part.backend) for part in model.modules() if isinstance(part, W4A16Linear)})
        report.record.setdefault("models", {})[variant] = {
            "stored_gb": stored,
            "peak_while_made_gb": None if peak is None else peak / 1e9,
            "backends": backends,
            "layer_errors": _layer_errors(architecture, model, device, options, budget),
        }
        budget.log(f"{variant}: {stored:.2f} GB, backends {', '.join(backends) or 'none'}")
        for mode in sorted(options.modes, key=MODES.index):
            if mode.startswith("compiled"):
                model.compile_repeated_blocks(fullgraph=True)
            for case in cases:
                row = {
                    "size": case.size,
                    "batch": case.batch,
                    "tokens": case.tokens,
                    "variant": variant,
                    "mode": mode,
                }
                if budget.spent:
                    report.add({**row, "note": "no time left"})
                    continue
                budget.log(f"{variant} {mode} {case.size}, batch {case.batch}")
                try:
                    recorded = mode.endswith("graph")
                    with _recorded(model, device) if recorded else nullcontext():
                        measured = _measure(
                            model, case, device, options, outputs, packed=compute is not None, recorded=recorded
                        )
                except Exception as error:  # noqa: BLE001  a row that fails must not take the others with it
                    report.add({**row, "note": measuring.reason(error)})
                else:
                    report.add({**row, "stored_gb": stored, **measured, **_ratios(report.rows, row, measured)})
                measuring.release(device)
        del model
        measuring.release(device)
    report.save()
    return report


def _model(
    architecture: Architecture, compute: str | None, device: torch.device, options: argparse.Namespace
) -> nn.Module:
    generator = torch.Generator(device).manual_seed(options.seed)
    with torch.device("meta"):
        model = architecture.build()
    architecture.mend(model)

    def replace(name: str, module: nn.Module) -> W4A16Linear | None:
        if compute is None or type(module) is not nn.Linear or not name.startswith(architecture.blocks):
            return None
        return random_weights.packed_linear(
            module, device=device, dtype=DTYPE, generator=generator, compute=compute, backend=options.backend
        )

    random_weights.fill(model, device=device, dtype=DTYPE, generator=generator, replace=replace)
    return model.to(device)


@contextmanager
def _recorded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the model run as a CUDA graph for a while."""
    record_calls(model, type(model).__name__, functools.partial(CudaGraph, device, torch.cuda.graph_pool_handle()))
    try:
        yield
    finally:
        for name in ("forward", "_apply"):  # what the class defines shows again, and the recordings go
            del vars(model)[name]


def _measure(
    model: nn.Module,
    case: Case,
    device: torch.device,
    options: argparse.Namespace,
    outputs: dict[tuple[bool, Case], Tensor],
    *,
    packed: bool,
    recorded: bool,
) -> dict[str, Any]:
    """Time a row; the difference is that to the first row of the same weights and inputs."""
    torch._dynamo.reset()  # else the next size would be compiled for sizes in general
    generator = torch.Generator(device).manual_seed(options.seed + 1)
    inputs = [case.inputs(generator) for _ in range(_INPUTS)]
    calls = [functools.partial(model, **each, return_dict=False) for each in inputs]
    if recorded:  # which takes its memory once, with the second call
        measuring.reset_peak(device)
    first_call_s = measuring.warm_up(calls, device)
    if not recorded:
        measuring.reset_peak(device)
    timing = measuring.time_calls(calls, device, seconds=options.row_s)
    peak = measuring.peak_bytes(device)
    output = calls[0]()[0].float().cpu()
    reference = outputs.setdefault((packed, case), output)
    return {
        "time": timing,
        "peak_gb": None if peak is None else peak / 1e9,
        "first_call_s": first_call_s,
        "difference": None if reference is output else measuring.relative_error(output, reference),
        "note": None if bool(output.isfinite().all()) else "the output is not finite",
    }


def _ratios(rows: list[dict[str, Any]], row: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """Return time and peak memory relative to bf16 of the same mode and inputs, if that was measured."""
    alike = ("size", "batch", "mode")
    for other in rows:
        if other["variant"] != "bf16" or "median_ms" not in other or any(other[key] != row[key] for key in alike):
            continue
        ratios = {"ratio": measured["time"].median_ms / other["median_ms"]}
        if other["peak_gb"] is not None:
            ratios["peak_ratio"] = measured["peak_gb"] / other["peak_gb"]
        return ratios
    return {}


def _layer_errors(
    architecture: Architecture, model: nn.Module, device: torch.device, options: argparse.Namespace, budget: Budget
) -> list[dict[str, Any]]:
    """Hold one Linear of every shape in the blocks against a float64 product with the very weights it has."""
    generator = torch.Generator(device).manual_seed(options.seed + 2)
    seen = set()
    errors = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | W4A16Linear) or not name.startswith(architecture.blocks):
            continue
        shape = (layer.in_features, layer.out_features)
        if shape in seen:
            continue
        seen.add(shape)
        packed = isinstance(layer, W4A16Linear)
        weight = dequantize(layer.packed(), layer.scheme, torch.float64) if packed else layer.weight.double()
        for rows in _ERROR_ROWS[: 2 if options.tiny else None]:
            x = torch.randn(rows, layer.in_features, dtype=DTYPE, device=device, generator=generator)
            some = torch.randperm(rows, device=device, generator=generator)[:_COMPARED_ROWS]
            exact = x[some].double() @ weight.t()
            exact = exact if layer.bias is None else exact + layer.bias.double()
            error = measuring.relative_error(layer(x)[some], exact)
            errors.append({"layer": name, "in": shape[0], "out": shape[1], "rows": rows, "error": error})
            budget.log(f"  {shape[0]} x {shape[1]}, {rows} rows: relative error against float64 {error:.2e}")
        del weight
    return errors


def _skip(report: Report, variant: str, modes: Sequence[str], cases: Sequence[Case], note: str) -> None:
    for mode in modes:
        for case in cases:
            shown = {"size": case.size, "batch": case.batch, "tokens": case.tokens}
            report.add({**shown, "variant": variant, "mode": mode, "note": note})


def _chart(rows: list[dict[str, Any]]) -> tuple[str, list[str], dict[str, dict[str, float]]]:
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        series.setdefault(f"{row['variant']} {row['mode']}", {})[f"{row['size']}, {row['batch']}"] = row[
            "median_ms"
        ]
    return "size, batch", list(dict.fromkeys(position for line in series.values() for position in line)), series
