"""What a server sustains: throughput, latency and time to the first token, W4A16 against BF16, one replica and two.

Quantizes the embedded model (recipe demo-flux, rounded to nearest), makes a random chat model and its packed
copy, serves each and loads it (see load.py)::

    python eval/perf/serve.py --output serve.json --html serve.html

With ``--full-flux`` it measures instead, on an accelerator, a random FLUX.1-dev of full size: images per minute and
peak memory of BF16, W4A16 and fp8, and how many replicas fit into cards of 24 to 141 GB (see full_flux.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load import Sample, Work, run, summarize

IMAGE = Work("image", size=64, steps=8)
CHAT = Work("chat", tokens=64)
IMAGE_CALLERS = (1, 2, 4)
CHAT_CALLERS = (1, 4, 8)
OPEN_SHARE = 0.7  # of the best closed throughput
ROUNDS = 4


def main() -> None:
    """Run all and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each run (default 20)")
    parser.add_argument("--only", choices=["image", "chat", "replicas"], help="a part")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--html", type=Path, help="page with the plots to write")
    parser.add_argument("--full-flux", action="store_true", help="a full-size random FLUX on an accelerator")
    given, rest = parser.parse_known_args()
    if given.full_flux:
        import full_flux

        full_flux.main([*rest, *(["--output", str(given.output)] if given.output else [])])
        return
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in (None, "image", "replicas"):
            images = make_images(folder)
        if given.only in (None, "image"):
            rows += compare(images, folder, IMAGE, IMAGE_CALLERS, given.seconds)
        if given.only in (None, "replicas"):
            for replicas in (1, 2):
                with served(images["W4A16"], folder, "--engine", "ray", "--min-replicas", str(replicas)) as url:
                    run(url, IMAGE, 3, concurrency=4)  # warm up
                    samples = run(url, IMAGE, given.seconds, concurrency=4)
                rows.append(row_of(IMAGE, "W4A16", "closed, 4", [samples], replicas))
        if given.only in (None, "chat"):
            rows += compare(make_chats(folder), folder, CHAT, CHAT_CALLERS, given.seconds)
    result = describe(rows, given.seconds)
    print_table(rows)
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.html is not None:
        from plots import page

        given.html.write_text(page(result), encoding="utf-8")


def describe(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return rows with what they were measured on."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "ray", "quantkit")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per engine",
        "versions": {name: version(name) for name in names},
        "seconds": seconds,
        "rows": rows,
    }


def compare(
    models: dict[str, Path], folder: Path, work: Work, callers: tuple[int, ...], seconds: float
) -> list[dict[str, Any]]:
    """Load servers of several models in turns, so that what else the machine does falls on all alike."""
    rows = []
    with ExitStack() as stack:
        urls = {variant: stack.enter_context(served(path, folder)) for variant, path in models.items()}
        for url in urls.values():
            run(url, work, 2, concurrency=max(callers))  # warm up
        best = dict.fromkeys(urls, 0.0)
        for count in callers:
            runs = in_turns(urls, lambda url, count=count: run(url, work, seconds / ROUNDS, concurrency=count))
            for variant, samples in runs.items():
                rows.append(row_of(work, variant, f"closed, {count}", samples))
                best[variant] = max(best[variant], rows[-1]["per_s"])
        rate = OPEN_SHARE * min(best.values())  # the same for all; arrivals are too few for short rounds
        for variant, url in urls.items():
            samples = run(url, work, seconds, rate=rate)
            rows.append(row_of(work, variant, f"open, {rate:.2f}/s", [samples]))
    return rows


def in_turns(urls: dict[str, str], load: Callable[[str], list[Sample]]) -> dict[str, list[list[Sample]]]:
    """Load every server once in each round."""
    runs: dict[str, list[list[Sample]]] = {variant: [] for variant in urls}
    for _ in range(ROUNDS):
        for variant, url in urls.items():
            runs[variant].append(load(url))
    return runs


def row_of(work: Work, variant: str, loop: str, runs: list[list[Sample]], replicas: int = 0) -> dict[str, Any]:
    """Return a row of the result."""
    return {"kind": work.kind, "variant": variant, "replicas": replicas, "loop": loop} | asdict(summarize(runs))


@contextmanager
def served(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """Serve a model on a free port; yield the URL when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "--port",
        str(port),
        "--state-dir",
        str(folder / f"state-{port}"),
        "--log-format",
        "text",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = folder / f"server-{port}.log"
    log = path.open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit_runtime.server", str(model), "--served-model-name", "model", *arguments],
        env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process, path)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    answers = 0
    while answers < 10:  # every replica is asked
        if process.poll() is not None or time.monotonic() > end:
            sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=10) as answer:  # noqa: S310  (http, from above)
                answers += answer.status == 200
        except OSError:
            answers = 0
            time.sleep(0.3)


def make_images(folder: Path) -> dict[str, Path]:
    """Return the embedded model and its W4A16 copy."""
    import quantkit.demo

    packed = folder / "demo-w4a16"
    command = ["quantize", "--recipe", "demo-flux", "--set", "scheme.iters=0", "--output", str(packed)]
    subprocess.run([sys.executable, "-m", "quantkit.cli.main", *command], check=True, stdout=subprocess.DEVNULL)
    return {"BF16": quantkit.demo.path(), "W4A16": packed}


def make_chats(folder: Path) -> dict[str, Path]:
    """Return a random Llama of 120 million parameters and its W4A16 copy."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from quantkit_runtime.format import Scheme, pack
    from quantkit_runtime.rounding import quantize_rtn

    whole, packed = folder / "chat", folder / "chat-w4a16"
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = dict.fromkeys(("eos_token", "pad_token"), "<end>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(whole)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=511, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(whole)
    shutil.copytree(whole, packed)
    scheme = Scheme(bits=4, group_size=128, sym=True)
    tensors = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        if name.startswith("model.layers.") and tensor.ndim == 2:
            parts = pack(*quantize_rtn(tensor, scheme), scheme)
            tensors |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    path = packed / "config.json"
    quantization = {
        "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return {"BF16": whole, "W4A16": packed}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per run, as Markdown."""
    times = "p50 / p90 / p99, s | first token p50 / p90, ms"
    print(f"| | weights | replicas | loop | requests/s | tokens/s | {times} | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        latency = " / ".join(f"{value:.2f}" for value in row["latency_s"].values())
        first = " / ".join(f"{1e3 * row['first_s'][part]:.0f}" for part in ("p50", "p90")) if row["first_s"] else ""
        tokens = f"{row['tokens_per_s']:.0f}" if row["tokens_per_s"] else ""
        replicas = f"{row['replicas']} (Ray)" if row["replicas"] else "1"
        print(
            f"| {row['kind']} | {row['variant']} | {replicas} | {row['loop']} | {row['per_s']:.2f} | {tokens} | "
            f"{latency} | {first} | {row['failed']} |"
        )


if __name__ == "__main__":
    main()
