"""The experts of Qwen3-Omni-30B-A3B's thinker while it decodes: packed against transformers' own BF16 experts.

A layer of 128 experts, 8 a token, for 1 to 4096 tokens. BF16 runs through each of the implementations that
transformers dispatches to. Packed experts are compared with the fastest of them; the one that transformers takes by
itself is named. Time is that of a call captured in a CUDA graph, where it can be, else between device events;
``events ms`` is the latter in any case, launches and all. Calls go over several layers and routings in turn, so
that no weight is in the cache::

    PYTHONPATH=runtime python eval/perf/qwen_decode.py --output qwen-decode.json --plot qwen-decode.svg

With ``--full`` also tokens per second of the whole text decoder and its head at random weights: 61 GB in BF16::

    PYTHONPATH=runtime python eval/perf/qwen_decode.py --tokens 1 --full --output qwen-full.json

Needs torch and transformers; without ``--full`` about 20 GB of device memory.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import measuring
import random_experts
import random_weights
from measuring import Budget, Column, Report, Timing
from quantkit_runtime.packed import PackedLayer

MODEL = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
BF16_DECODER = "grouped_mm"  # the only one that takes many tokens and never waits for the host
VARIANTS = {"bf16": None, "w4a16": "16bit", "fp8": "fp8"}
TINY = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 256,
}  # fmt: skip
_WAITS_FOR_HOST = ("eager", "reference", "cpu")  # looks at the routing on the host, which a graph cannot hold
_MAX_COPY_BYTES = 8e9  # batched_mm copies the weights of every expert of every token
_SPARE_TOKENS = 512  # room in the cache for the steps that are measured

_COLUMNS = (
    Column("what", "what", width=8),
    Column("tokens", "tokens", width=7),
    Column("variant", "variant", width=9),
    Column("implementation", "by", width=12),
    Column("median_ms", "ms", ".4f", 10),
    Column("p10_ms", "10 %", ".4f", 10),
    Column("p90_ms", "90 %", ".4f", 10),
    Column("clock", "clock", width=8),
    Column("events_ms", "events ms", ".4f", 11),
    Column("speedup", "faster", ".2f", 8),
    Column("tokens_per_s", "tokens/s", ".0f", 10),
    Column("stored_gb", "stored GB", ".3f", 11),
    Column("peak_gb", "peak GB", ".3f", 9),
    Column("memory_ratio", "to bf16", ".3f", 9),
    Column("error", "rel. error", ".2e", 12),
    Column("note", "", width=0),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON and the plot."""
    parser = measuring.common_options(__doc__)
    parser.add_argument(
        "--variants", type=measuring.choices(*VARIANTS), default=list(VARIANTS), help="of bf16,w4a16,fp8"
    )
    parser.add_argument("--tokens", type=measuring.numbers, help="tokens a call (default 1,4,16,64,512,4096)")
    parser.add_argument("--layers", type=int, default=8, help="layers to go over in turn (default 8)")
    parser.add_argument("--full", action="store_true", help="also decode with the whole text decoder")
    parser.add_argument("--batches", type=measuring.numbers, default=[1], help="sequences with --full (default 1)")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens already decoded with --full (default 1024)"
    )
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or ([1, 4] if options.tiny else [1, 4, 16, 64, 512, 4096])
    if options.tiny:
        options.layers, options.context = min(options.layers, 2), min(options.context, 16)
    text = measuring.published(MODEL, "config.json")["thinker_config"]["text_config"]
    config = text_config(text | (TINY if options.tiny else {}))
    name = f"Qwen3-Omni-30B-A3B experts{' (tiny)' if options.tiny else ''}"
    report = Report(name, _COLUMNS, options, _chart)
    report.record["transformers_takes"] = own_choice(config)
    print(f"transformers takes {report.record['transformers_takes']}", flush=True)
    budget = Budget(options.budget_s)
    with torch.no_grad():
        for variant in options.variants:
            measure_experts(variant, config, options, report, budget)
        for variant in options.variants if options.full else ():
            measure_decoder(variant, config, options, report, budget)
    report.save()


def text_config(content: dict[str, Any]) -> Any:
    """Return transformers' configuration of the text decoder."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

    return Qwen3OmniMoeTextConfig(**{key: value for key, value in content.items() if key != "model_type"})


def own_choice(config: Any) -> str:
    """Return the implementation of experts that transformers takes where nobody asks for one."""
    return str(decoder_class()(small(config)).config._experts_implementation)


def decoder_class() -> Any:
    """Return transformers' text decoder."""
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextModel

    return Qwen3OmniMoeThinkerTextModel


def small(config: Any) -> Any:
    """Return the configuration of a decoder without layers, made in no time."""
    return text_config({**config.to_dict(), "num_hidden_layers": 0, "vocab_size": 8, "pad_token_id": None})


def measure_experts(variant: str, config: Any, options: argparse.Namespace, report: Report, budget: Budget) -> None:
    """Measure layers of experts, BF16 through every implementation."""
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    compute = VARIANTS[variant]
    implementations = IMPLEMENTATIONS if compute is None else (None,)
    base = {"what": "experts", "variant": variant}
    budget.log(f"{variant}: making {options.layers} layers of experts")
    make = functools.partial(random_experts.random_experts, config, compute, device, generator, options.backend)
    try:
        layers = [make() for _ in range(options.layers)]
    except Exception as error:  # noqa: BLE001  a variant that fails must not take the others with it
        for tokens in options.tokens:
            report.add({**base, "tokens": tokens, "note": measuring.reason(error)})
        measuring.release(device)
        return
    for tokens in options.tokens:
        for implementation in implementations:
            row = {**base, "tokens": tokens, "implementation": implementation or layers[0].backend}
            note = _why_left_out(row, config, budget)
            if note is not None:
                report.add({**row, "note": note})
                continue
            budget.log(f"{variant} {row['implementation']}, {tokens} tokens")
            if implementation is not None:
                config._experts_implementation = implementation
            try:
                inputs = [random_experts.routed(config, tokens, device, generator) for _ in layers]
                calls = [functools.partial(layer, *each) for layer, each in zip(layers, inputs, strict=True)]
                measured = clocked(calls, row["implementation"], device, options.row_s)
                measured["error"] = random_experts.error_of(layers[0], inputs[0], calls[0]())
            except Exception as error:  # noqa: BLE001  a row that fails must not take the others with it
                report.add({**row, "note": measuring.reason(error)})
            else:
                stored_gb = random_weights.stored_bytes(layers[0]) / 1e9
                if measured["peak_gb"] is not None:  # as if this were the only layer
                    others = sum(random_weights.stored_bytes(layer) for layer in layers[1:])
                    others += sum(tensor.nbytes for each in inputs for tensor in each)
                    measured["peak_gb"] -= others / 1e9
                found = {**row, **measured, "stored_gb": stored_gb}
                report.add({**found, **against_bf16(report.rows, found)})
            measuring.release(device)
    del layers
    measuring.release(device)


def _why_left_out(row: dict[str, Any], config: Any, budget: Budget) -> str | None:
    if budget.spent:
        return "no time left"
    copied = 4 * config.moe_intermediate_size * config.hidden_size * config.num_experts_per_tok * row["tokens"]
    if row["implementation"] == "batched_mm" and copied > _MAX_COPY_BYTES:
        return f"left out: it would copy {copied / 1e9:.0f} GB of weights"
    return None


def clocked(
    calls: Sequence[Callable[[], object]], implementation: str, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Time calls by events and, where possible, in a CUDA graph; ``time`` is the latter's if there is one."""
    measuring.warm_up(calls, device)
    measuring.reset_peak(device)
    events = measuring.time_calls(calls, device, seconds=seconds / 2)
    peak = measuring.peak_bytes(device)
    found: dict[str, Any] = {"events_ms": events.median_ms, "peak_gb": None if peak is None else peak / 1e9}
    graph: Timing | None = None
    if device.type == "cuda" and implementation not in _WAITS_FOR_HOST:
        try:
            graph = measuring.time_graph(calls, device, seconds=seconds / 2)
        except Exception as error:  # noqa: BLE001  whatever a capture may raise
            found["note"] = f"no CUDA graph: {measuring.reason(error)}"
    return {**found, "time": graph or events, "clock": "graph" if graph else "events"}


def against_bf16(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, float]:
    """Return how much faster a packed row is than the fastest of BF16, and its memory relative to that one's."""
    alike = [
        other
        for other in rows
        if other["variant"] == "bf16" != row["variant"]
        and "median_ms" in other
        and (other["what"], other["tokens"]) == (row["what"], row["tokens"])
    ]
    if not alike:
        return {}
    best = min(alike, key=lambda other: other["median_ms"])
    key = "stored_gb" if row["peak_gb"] is None else "peak_gb"
    return {"speedup": best["median_ms"] / row["time"].median_ms, "memory_ratio": row[key] / best[key]}


def measure_decoder(variant: str, config: Any, options: argparse.Namespace, report: Report, budget: Budget) -> None:
    """Measure a step of the whole text decoder and its head, attention and experts packed."""
    device = torch.device(options.device)
    implementation = BF16_DECODER if variant == "bf16" else "packed"
    base = {"what": "decoder", "variant": variant, "implementation": implementation}
    if budget.spent:
        report.add({**base, "note": "no time left"})
        return
    budget.log(f"{variant}: making the decoder")
    measuring.reset_peak(device)
    try:
        decoder = random_decoder(variant, config, options, device)
    except Exception as error:  # noqa: BLE001  a variant that fails must not take the others with it
        report.add({**base, "note": measuring.reason(error)})
        measuring.release(device)
        return
    stored_gb = random_weights.stored_bytes(decoder) / 1e9
    for batch in options.batches:
        row = {**base, "tokens": batch, "stored_gb": stored_gb}
        if budget.spent:
            report.add({**row, "note": "no time left"})
            continue
        budget.log(f"{variant} decoder, {batch} sequences")
        try:
            step = decoding_step(decoder, config, batch, options, device)
            measured = clocked([step], row["implementation"], device, options.row_s)
        except Exception as error:  # noqa: BLE001  a row that fails must not take the others with it
            report.add({**row, "note": measuring.reason(error)})
        else:
            found = {**row, **measured}
            rate = {"tokens_per_s": 1e3 * batch / found["time"].median_ms}
            report.add({**found, **rate, **against_bf16(report.rows, found)})
        measuring.release(device)
    del decoder
    measuring.release(device)


def random_decoder(variant: str, config: Any, options: argparse.Namespace, device: torch.device) -> nn.ModuleDict:
    """Make decoder and head; the router, norms, embedding and head stay in 16 bit."""
    compute = VARIANTS[variant]
    generator = torch.Generator(device).manual_seed(options.seed)
    config._experts_implementation = BF16_DECODER
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        text = decoder_class()(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    text.rotary_emb = type(text.rotary_emb)(config)
    decoder = nn.ModuleDict({"text": text, "head": head})

    def replace(name: str, module: nn.Module) -> PackedLayer | None:
        if compute is None or ".layers." not in name:
            return None
        if name.endswith(".experts"):
            return random_experts.packed_experts(module, config, compute, device, generator, options.backend)
        if type(module) is nn.Linear:
            return random_weights.packed_linear(
                module,
                device=device,
                dtype=random_experts.DTYPE,
                generator=generator,
                compute=compute,
                backend=options.backend,
            )
        return None

    random_weights.fill(decoder, device=device, dtype=random_experts.DTYPE, generator=generator, replace=replace)
    return decoder.to(device)


def decoding_step(
    decoder: nn.ModuleDict, config: Any, batch: int, options: argparse.Namespace, device: torch.device
) -> Callable[[], Tensor]:
    """Fill the cache with a context and return what decodes a further token of every sequence."""
    from transformers import StaticCache

    generator = torch.Generator(device).manual_seed(options.seed + 1)
    cache = StaticCache(config=config, max_cache_len=options.context + _SPARE_TOKENS)

    def forward(tokens: Tensor) -> Tensor:
        hidden = decoder["text"](input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        logits: Tensor = decoder["head"](hidden[:, -1:])
        return logits

    def some(count: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, count), device=device, generator=generator)

    forward(some(options.context))
    return functools.partial(forward, some(1))


def _chart(rows: list[dict[str, Any]]) -> tuple[str, list[str], dict[str, dict[str, float]]]:
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["what"] == "experts":
            series.setdefault(f"{row['variant']} {row['implementation']}", {})[str(row["tokens"])] = row[
                "median_ms"
            ]
    positions = sorted({position for line in series.values() for position in line}, key=int)
    return "tokens a call", positions, series


if __name__ == "__main__":
    main()
