"""How fast packed layers are on a CPU beside bf16 ones, and how exact.

Every shape runs in one process with its bf16 counterpart, turn about, over enough layers that no weight stays in
the cache::

    python eval/perf/cpu_linear.py --threads 2 --output cpu-linear.json

A time is the median of many. Beside it stands the error against a float64 product with the same dequantized weight,
relative to the norm of the output. Only the ratios mean something: times are those of the machine at hand. The
second ratio is that of the fastest tenths, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit_runtime import W4A16Experts, W4A16Linear
from quantkit_runtime.format import Scheme, dequantize, pack
from quantkit_runtime.rounding import quantize_rtn

SHAPES = ((3072, 3072), (3072, 12288), (12288, 3072), (5120, 13824))
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
# Qwen3-Omni's thinker: experts, experts of a token, hidden size, intermediate size.
EXPERTS = (128, 8, 2048, 768)
TOKENS = (1, 4, 16, 128, 512)
CACHE_BYTES = 96 << 20
LEAST_ROUNDS = 7
ROUNDS_AT_ONCE = 3


def main() -> None:
    """Measure, print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of a table (default 2)")
    parser.add_argument("--asym", action="store_true", help="asymmetric weights")
    parser.add_argument("--only", choices=("linear", "experts"), help="measure these alone")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help=f"rows of Linear layers (default {ROWS})")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scheme = Scheme(group_size=128, sym=not options.asym)
    with torch.inference_mode():
        linear = list(measure_linear(scheme, options)) if options.only != "experts" else []
        experts = list(measure_experts(scheme, options)) if options.only != "linear" else []
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "quantkit-runtime")},
        "scheme": vars(scheme),
        "linear": linear,
        "experts": experts,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_linear(scheme: Scheme, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each shape and number of rows."""
    headers = ("rows", "bf16 ms", "packed ms", "faster", "tenths", "bf16 error", "packed error")
    print(f"{'K x N':14}", *(f"{header:>12}" for header in headers))
    for in_features, out_features in SHAPES:
        count = -(-CACHE_BYTES // (in_features * out_features * 2))
        pairs = [make_linear(in_features, out_features, scheme, seed) for seed in range(count)]
        weight = dequantize(pairs[0][0].packed(), scheme, torch.float64)
        for rows in options.rows:
            x = torch.randn(rows, in_features).to(torch.bfloat16)
            calls = {
                "bf16": [dense for _, dense in pairs],
                "packed": [packed for packed, _ in pairs],
            }
            exact = x.double() @ weight.t()
            line = {"in_features": in_features, "out_features": out_features, "rows": rows}
            line |= compare(calls, (x,), exact, options.seconds)
            keys = ("bf16_ms", "packed_ms", "faster", "faster_tenth", "bf16_error", "packed_error")
            print(f"{f'{in_features} x {out_features}':14} {rows:12}", *cells(line, keys), flush=True)
            yield line


def cells(line: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """Yield numbers of a line as they are printed."""
    for key in keys:
        yield f"{line[key]:12.1e}" if key.endswith("error") else f"{line[key]:12.3f}"


def make_linear(in_features: int, out_features: int, scheme: Scheme, seed: int) -> tuple[W4A16Linear, nn.Linear]:
    """Return a packed layer and a bf16 one with the same weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    packed = W4A16Linear(
        in_features, out_features, bias=False, group_size=scheme.group_size, sym=scheme.sym
    )  # fmt: skip
    packed.load_state_dict(pack(*quantize_rtn(weight, scheme), scheme))
    packed.prepare(torch.bfloat16)
    dense = nn.Linear(in_features, out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(dequantize(packed.packed(), scheme, torch.bfloat16), requires_grad=False)
    return packed, dense


def measure_experts(scheme: Scheme, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each number of tokens."""
    count, top_k, hidden, inner = EXPERTS
    packed, gate_up, down = make_experts(scheme)
    kept = packed.extra_bytes / (gate_up.numel() + down.numel())
    print(
        f"\n{count} experts, {top_k} of a token, {hidden}/{inner}; beside the checkpoint {kept:.2f} bytes a weight"
    )
    headers = ("tokens", "bf16 ms", "reference ms", "packed ms", "faster", "tenths", "packed error")
    print(*(f"{header:>12}" for header in headers))
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        weights, index = torch.rand(tokens, count).topk(top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
        reference = make_reference(packed)
        calls = {
            "bf16": [partial(dense_experts, gate_up, down)],
            "reference": [reference],
            "packed": [packed],
        }
        exact = dense_experts(*doubled(packed, scheme, index), x.double(), index, weights.double())
        line = {"tokens": tokens, "kept_bytes_per_weight": kept} | compare(
            calls, (x, index, weights), exact, options.seconds
        )
        keys = ("bf16_ms", "reference_ms", "packed_ms", "faster", "faster_tenth", "packed_error")
        print(f"{tokens:12}", *cells(line, keys), flush=True)
        yield line


def make_experts(scheme: Scheme) -> tuple[W4A16Experts, Tensor, Tensor]:
    """Return packed experts, and the same weights dense in bf16."""
    count, _, hidden, inner = EXPERTS
    layer = W4A16Experts(count, hidden, inner, scheme=scheme, activation=functional.silu)
    generator = torch.Generator().manual_seed(0)
    dense = {}
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        dense[name] = torch.empty(count, rows, columns, dtype=torch.bfloat16)
        stacks = layer.packed(name)
        for expert in range(count):
            weight = torch.randn(rows, columns, generator=generator) / columns**0.5
            tensors = pack(*quantize_rtn(weight, scheme), scheme)
            for suffix, tensor in tensors.items():
                stacks[suffix][expert] = tensor
            dense[name][expert] = dequantize(tensors, scheme, torch.bfloat16)
    layer.prepare(torch.bfloat16)
    return layer, dense["gate_up"], dense["down"]


def make_reference(packed: W4A16Experts) -> W4A16Experts:
    """Return experts with the same tensors that unpack in every call."""
    sizes = (packed.num_experts, packed.hidden_size, packed.intermediate_size)
    other = W4A16Experts(*sizes, scheme=packed.scheme, activation=packed.activation, device="meta")
    for name, buffer in packed.named_buffers():
        setattr(other, name, buffer)
    other.prepare(torch.bfloat16, backend="reference")
    return other


def doubled(packed: W4A16Experts, scheme: Scheme, index: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the weights of the experts that are used, in float64."""
    both = []
    for name in ("gate_up", "down"):
        stacks = packed.packed(name)
        both.append(
            {
                expert: dequantize({key: stack[expert] for key, stack in stacks.items()}, scheme, torch.float64)
                for expert in index.unique().tolist()
            }
        )
    return both[0], both[1]


def dense_experts(gate_up: Any, down: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what transformers' loop over dense experts gives."""
    out = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, down[expert]) * weights[token, slot, None]
        out.index_add_(0, token, y)
    return out


def compare(
    calls: dict[str, list[Callable[..., Tensor]]], arguments: tuple[Tensor, ...], exact: Tensor, seconds: float
) -> dict[str, float]:
    """Time each kind of layer, turn about, and hold its output against the exact one.

    Args:
        calls: For each kind the layers to go through; the first must compute ``exact``.
        arguments: Of every call.
        exact: Output in float64.
        seconds: To spend.
    """
    line = {}
    for name, layers in calls.items():
        error = torch.linalg.vector_norm(layers[0](*arguments).double() - exact) / torch.linalg.vector_norm(exact)
        line[f"{name}_error"] = float(error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < LEAST_ROUNDS:
        for name, layers in calls.items():
            for step in range(ROUNDS_AT_ONCE):
                layer = layers[(turn * ROUNDS_AT_ONCE + step) % len(layers)]
                began = time.perf_counter()
                layer(*arguments)
                times[name].append((time.perf_counter() - began) * 1e3)
        turn += 1
    for name, values in times.items():
        line[f"{name}_ms"] = statistics.median(values)
        line[f"{name}_tenth_ms"] = statistics.quantiles(values, n=10)[0]
    line["faster"] = line["bf16_ms"] / line["packed_ms"]
    line["faster_tenth"] = line["bf16_tenth_ms"] / line["packed_tenth_ms"]
    return line | {"timed": len(times["packed"])}


if __name__ == "__main__":
    main()
