"""Time of one Linear layer over numbers of rows, for the shapes of all families: W4A16, FP8 compute, and peers.

::

    python eval/perf/gemm.py --output gemm.json --plot gemm.svg

Every time is that of a call inside a CUDA graph, weights rotated so that they come from memory, the variants of a
row replayed in turn. ``floor`` is the larger of the fewest bytes over the card's copy rate and the operations over
its bf16 rate, both measured first. Errors are against float64: of the product with the weights as they are stored
(``rel. error``), and beside it what rounding the weights to 4 bit cost in the first place (``int4 error``).

======================  ==========================================================================================
``bf16``                torch's dense product
``auto``                what the runtime takes
``fused``, ``unpack``   the two kernels that it chooses between
``stream``              ``unpack`` for the next call on a second stream, while this one multiplies
``fp8``                 FP8 compute, quantization of the activations included
``tinygemm``            torch's own int4 operator
``marlin``              Marlin's kernel: it has fp16 only, for activations, results and sums of parts of K, so its
                        error is that of a finer rounding
======================  ==========================================================================================

``marlin`` needs nvcc in PATH, and the kernel's source, which is not part of this repository::

    python eval/perf/gemm.py --marlin marlin_cuda_kernel.cu --rows 1,4,8,16 --variants bf16,auto,marlin

It is the one file ``marlin/marlin_cuda_kernel.cu`` of the repository IST-DASLab/marlin; the source distribution of
auto-gptq 0.7.1 has it in ``autogptq_extension/marlin``, too. K must be a multiple of 128 and N one of 256.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import marlin
from measuring import (
    Budget,
    Column,
    Report,
    Timing,
    choices,
    common_options,
    numbers,
    reason,
    relative_error,
    release,
    time_graph,
    time_graphs,
    warm_up,
)
from quantkit_runtime import W4A16Linear
from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.format import dequantize, pack, unpack
from quantkit_runtime.rounding import quantize_rtn

# (K, N): FLUX.1-dev and GLM-Image-like widths, Wan2.2 A14B, Qwen2.5-Omni, Qwen3-Omni.
SHAPES = (
    (3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072), (3072, 18432),
    (5120, 5120), (5120, 13824), (13824, 5120),
    (3584, 3584), (3584, 18944), (18944, 3584),
    (2048, 4096),
)  # fmt: skip
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4608, 16384)
VARIANTS = ("bf16", "auto", "fused", "unpack", "stream", "fp8", "tinygemm", "marlin")
_ROTATED_BYTES = 256e6
_LEAST_STREAM_ROWS = 2048
_MOST_TINYGEMM_ROWS = 64
_GROUP = 128
_ALWAYS, _NEVER = 1 << 30, 0

COLUMNS = (
    Column("shape", "K x N", width=14),
    Column("rows", "rows", "d", 7),
    Column("variant", "", width=10),
    Column("median_us", "us", ".1f", 10),
    Column("spread", "10 to 90 %", width=18),
    Column("speed", "x bf16", ".2f", 8),
    Column("over_floor", "x floor", ".2f", 9),
    Column("error", "rel. error", ".5f", 12),
    Column("int4_error", "int4 error", ".4f", 12),
    Column("note", "", width=0),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the grid and print it."""
    parser = common_options(__doc__)
    parser.add_argument("--shapes", help="e.g. 3072x12288,5120x13824 (default: those of all families)")
    parser.add_argument("--rows", type=numbers, default=list(ROWS), help="numbers of rows, e.g. 1,16,4608")
    parser.add_argument("--variants", type=choices(*VARIANTS), default=list(VARIANTS), help=f"of {VARIANTS}")
    parser.add_argument("--marlin", type=Path, help="marlin_cuda_kernel.cu, Marlin's source, for its variant")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type != "cuda" and not options.tiny:
        parser.error("needs a CUDA device: times are those of CUDA graphs (--tiny checks the script on a CPU)")
    shapes = (
        SHAPES
        if options.shapes is None
        else [tuple(map(int, text.split("x"))) for text in options.shapes.split(",")]
    )
    if options.tiny:
        shapes, options.rows = [(256, 128)], [1, 3]
    budget = Budget(options.budget_s)
    report = Report("one Linear layer", COLUMNS, options, _chart)
    ceilings = _ceilings(device) if device.type == "cuda" else None
    report.record["ceilings"] = ceilings
    kernel = _marlin_kernel(options, device)
    for in_features, out_features in shapes:
        bench = Bench(in_features, out_features, options, device, kernel)
        for rows in options.rows:
            if budget.spent:
                return
            for row in bench.rows(rows, ceilings):
                report.add(row)
        del bench
        release(device)


class Bench:
    """Weights of one shape, and the variants over them.

    Args:
        in_features: K.
        out_features: N.
        options: Of the command line.
        device: Where all of it is.
        kernel: Marlin's, or why there is none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: argparse.Namespace,
        device: torch.device,
        kernel: marlin.Kernel | str,
    ) -> None:
        self._size = (in_features, out_features)
        self._options = options
        self._device = device
        self._generator = torch.Generator(device).manual_seed(options.seed)
        self._original = torch.randn(out_features, in_features, device=device, generator=self._generator)
        self._original *= in_features**-0.5
        copies = 2 if options.tiny else max(3, round(_ROTATED_BYTES / (in_features * out_features / 2)))
        self._dense = [
            (self._original + 0.1 * index / in_features).to(torch.bfloat16) for index in range(max(3, copies // 4))
        ]
        self._states = [self._packed(copy) for copy in range(copies)]
        self._layers = {compute: self._load(compute) for compute in ("16bit", "fp8")}
        self._marlin: list[Callable[[Tensor], Tensor]] = []
        refused = kernel if isinstance(kernel, str) else marlin.why_not(in_features, out_features)
        self._left_out = {} if refused is None else {"marlin": refused}
        if isinstance(kernel, marlin.Kernel) and refused is None:
            self._marlin = self._marlin_products(kernel)

    def rows(self, rows: int, ceilings: dict[str, float] | None) -> list[dict[str, Any]]:
        """Measure every variant for so many rows."""
        in_features, out_features = self._size
        x = torch.randn(rows, in_features, device=self._device, generator=self._generator).to(torch.bfloat16)
        variants, notes = self._variants(x), dict(self._left_out)
        for name, calls in list(variants.items()):
            try:
                warm_up(calls, self._device)
            except (RuntimeError, QuantkitRuntimeError) as error:
                notes[name] = reason(error)
                del variants[name]
        times: dict[str, Timing | None] = dict.fromkeys(variants)
        if self._device.type == "cuda":
            times = dict(time_graphs(variants, seconds=self._options.row_s))
        table = []
        for name in (name for name in self._options.variants if name in variants or name in notes):
            row = {"shape": f"{in_features}x{out_features}", "rows": rows, "variant": name, "note": notes.get(name)}
            timing = times.get(name)
            if timing is not None and ceilings is not None:
                row |= self._figures(timing, times.get("bf16"), rows, ceilings)
            if name in variants and name not in ("bf16", "stream", "tinygemm"):
                row |= self._errors(variants[name][0](), x)
            table.append(row)
        return table

    def _variants(self, x: Tensor) -> dict[str, list[Callable[[], Any]]]:
        rows = len(x)
        packed, fp8 = self._layers["16bit"], self._layers["fp8"]
        found: dict[str, list[Callable[[], Any]]] = {
            "bf16": [lambda weight=weight: functional.linear(x, weight) for weight in self._dense],
            "auto": [lambda layer=layer: layer(x) for layer in packed],
        }
        if packed[0].backend == "triton":
            found["fused"] = [lambda layer=layer: _linear(layer, x, _ALWAYS) for layer in packed]
            found["unpack"] = [lambda layer=layer: _linear(layer, x, _NEVER) for layer in packed]
            if rows >= _LEAST_STREAM_ROWS:
                found["stream"] = _on_two_streams(packed, x)
        if fp8:
            found["fp8"] = [lambda layer=layer: layer(x) for layer in fp8]
        if rows <= _MOST_TINYGEMM_ROWS and self._device.type == "cuda":
            found["tinygemm"] = _tinygemm(self._size, x, len(self._states), self._generator)
        if self._marlin:
            half = x.to(torch.float16)
            found["marlin"] = [lambda product=product: product(half) for product in self._marlin]
        return {name: calls for name, calls in found.items() if name in self._options.variants}

    def _figures(
        self, timing: Timing, bf16: Timing | None, rows: int, ceilings: dict[str, float]
    ) -> dict[str, Any]:
        in_features, out_features = self._size
        moved = in_features * out_features * (0.5 + 2 / _GROUP) + 2 * rows * (in_features + out_features)
        floor_us = 1e6 * max(
            moved / ceilings["bytes_per_s"], 2 * rows * in_features * out_features / ceilings["flop_per_s"]
        )
        median_us = 1e3 * timing.median_ms
        return {
            "time": timing,
            "median_us": median_us,
            "spread": f"{1e3 * timing.p10_ms:.1f} to {1e3 * timing.p90_ms:.1f}",
            "speed": None if bf16 is None else bf16.median_ms / timing.median_ms,
            "over_floor": median_us / floor_us,
        }

    def _errors(self, out: Tensor, x: Tensor) -> dict[str, float]:
        few = slice(0, 64)  # float64 products of all rows would take longer than the measurement
        stored = dequantize(self._states[0], self._layers["16bit"][0].scheme, torch.float64)
        exact = x[few].double() @ stored.t()
        original = x[few].double() @ self._original.double().t()
        return {"error": relative_error(out[few], exact), "int4_error": relative_error(exact, original)}

    def _packed(self, copy: int) -> dict[str, Tensor]:
        layer = W4A16Linear(*self._size, bias=False, group_size=_GROUP)
        if copy:  # random codes do for time; the first copy is a real rounding, for errors
            state = {name: tensor.clone() for name, tensor in self._states0.items()}
            state["qweight"].view(torch.uint8).random_(0, 256, generator=self._generator)
            return state
        codes, scales, zeros = quantize_rtn(self._original, layer.scheme)
        self._states0 = pack(codes, scales, zeros, layer.scheme)
        return self._states0

    def _load(self, compute: str) -> list[W4A16Linear]:
        layers = []
        for state in self._states:
            layer = W4A16Linear(*self._size, bias=False, group_size=_GROUP, device=self._device)
            layer.load_state_dict(state)
            try:
                layer.prepare(torch.bfloat16, compute=compute, backend=self._options.backend)
            except QuantkitRuntimeError:
                return []
            layers.append(layer)
        return layers

    def _marlin_products(self, kernel: marlin.Kernel) -> list[Callable[[Tensor], Tensor]]:
        """Products with as many weights as the runtime's layers have, the first of them the same."""
        codes, scales, _ = unpack(self._states[0], self._layers["16bit"][0].scheme)
        first = marlin.MarlinWeight.of(codes, scales)
        weights = [first, *(first.with_random_codes(self._generator) for _ in self._states[1:])]
        locks = marlin.locks_for(first.out_features, self._device)
        return [lambda x, weight=weight: kernel(x, weight, locks) for weight in weights]


def _marlin_kernel(options: argparse.Namespace, device: torch.device) -> marlin.Kernel | str:
    """Compile Marlin, or return why it is left out."""
    if "marlin" not in options.variants:
        return "not asked for"
    if options.marlin is None:
        return "--marlin does not name its source"
    try:
        return marlin.load(options.marlin, device)
    except marlin.MarlinError as error:
        return reason(error)


def _linear(layer: W4A16Linear, x: Tensor, fused_rows: int) -> Tensor:
    counters: Tensor = layer._kernel._counters
    out: Tensor = torch.ops.quantkit.linear(
        x, layer.qweight, layer.scales, None, None, counters, _GROUP, fused_rows
    )
    return out


def _on_two_streams(layers: list[W4A16Linear], x: Tensor) -> list[Callable[[], Any]]:
    """One call that goes through all layers, each unpacked on a second stream while the one before multiplies."""
    in_features = x.shape[1]
    side = torch.cuda.Stream()

    def unpack(layer: W4A16Linear) -> Tensor:
        weight: Tensor = torch.ops.quantkit.unpack(
            layer.qweight, layer.scales, None, _GROUP, in_features, torch.bfloat16
        )
        return weight

    def run() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            weight = unpack(layers[0])
        for index in range(len(layers)):
            main.wait_stream(side)
            following = weight
            if index + 1 < len(layers):
                with torch.cuda.stream(side):
                    following = unpack(layers[index + 1])
            functional.linear(x, weight)
            weight.record_stream(main)
            weight = following
        main.wait_stream(side)

    # As many times as layers, so that the time is that of one.
    return [run] + [lambda: None] * (len(layers) - 1)


def _tinygemm(size: tuple[int, int], x: Tensor, copies: int, generator: torch.Generator) -> list[Callable[[], Any]]:
    in_features, out_features = size
    scales = torch.ones(in_features // _GROUP, out_features, 2, device=x.device, dtype=torch.bfloat16)
    weights = []
    for _ in range(copies):
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=x.device)
        codes.random_(0, 256, generator=generator)
        weights.append(torch._convert_weight_to_int4pack(codes, 8))
    return [lambda weight=weight: torch._weight_int4pack_mm(x, weight, _GROUP, scales) for weight in weights]


def _ceilings(device: torch.device) -> dict[str, float]:
    """Measure what the card can do: bytes copied, counting read and write, and bf16 operations per second."""
    source = torch.randn(1 << 29, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    side = torch.randn(8192, 8192, device=device).to(torch.bfloat16)
    copy, product = lambda: target.copy_(source), lambda: side @ side
    warm_up([copy, product], device)
    copied, multiplied = (time_graph([call] * 4, device, seconds=0.5) for call in (copy, product))
    return {
        "bytes_per_s": 2 * source.nbytes / (copied.median_ms / 1e3),
        "flop_per_s": 2 * 8192**3 / (multiplied.median_ms / 1e3),
    }


def _chart(rows: list[dict[str, Any]]) -> tuple[str, list[str], dict[str, dict[str, float]]]:
    """Draw the largest shape of FLUX, or the first there is."""
    shapes = [row["shape"] for row in rows]
    shape = "3072x12288" if "3072x12288" in shapes else next(iter(shapes), "")
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["shape"] == shape:
            series.setdefault(row["variant"], {})[str(row["rows"])] = row["median_ms"]
    return f"rows, K x N = {shape}", list(dict.fromkeys(str(row["rows"]) for row in rows)), series


if __name__ == "__main__":
    main()
