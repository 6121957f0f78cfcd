"""Time from a W4A16 checkpoint on disk to a model that runs, beside the time of reading its bytes.

Writes a random Llama of ``--gb`` gigabytes, group size 128, into a temporary folder. Every measurement is a process
of its own that has imported everything before the clock starts. ``cold`` drops the files from the page cache first;
how much of them then really came from the disk is in the column beside it. On the CPU tensors stay in the mapped
files until they are used, so a load counts as over once every page of every tensor has been touched. ::

    python eval/perf/load_time.py --output load-time.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from measuring import machine
from quantkit_runtime.format import Scheme, packed_tensors

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
_PAGE = 4096
_CHUNK_BYTES = 16 * 2**20
_LAYERS_PER_FILE = 8


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument("--backends", nargs="+", default=["reference", "cpu"])
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, in turns (default 3)")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint (default: temporary)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        what, cache, folder = given.worker
        print(json.dumps(measure(what, cache, Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size = write_checkpoint(folder, given.gb)
        rows = []
        for cache in ("cold", "warm"):
            runs: dict[str, list[dict[str, Any]]] = {what: [] for what in ("read", *given.backends)}
            for _ in range(given.repeats):  # in turns, so that all see the same machine
                for what, found in runs.items():
                    found.append(_run(what, cache, folder))
            rows += [_row(cache, what, found, runs["read"]) for what, found in runs.items()]
    result = machine(torch.device("cpu")) | {"bytes": size, "repeats": given.repeats, "rows": rows}
    print_table(result)
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint of about this size in auto-round's layout; return its bytes."""
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(0)
    scheme = Scheme()
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (WIDTH, INNER), "mlp.up_proj": (WIDTH, INNER), "mlp.down_proj": (INNER, WIDTH)}
    outer = {name: _dense(VOCABULARY, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    outer["model.norm.weight"] = _dense(WIDTH)
    layer_bytes = sum(_nbytes(_packed(*shape, scheme, generator)) for shape in shapes.values())
    layers = max(1, round((gigabytes * 1e9 - _nbytes(outer)) / layer_bytes))

    def files() -> Iterator[dict[str, Tensor]]:
        yield outer
        for start in range(0, layers, _LAYERS_PER_FILE):
            held: dict[str, Tensor] = {}
            for number in range(start, min(start + _LAYERS_PER_FILE, layers)):
                prefix = f"model.layers.{number}"
                for name, shape in shapes.items():
                    packed = _packed(*shape, scheme, generator)
                    held |= {f"{prefix}.{name}.{key}": value for key, value in packed.items()}
                for name in ("input_layernorm", "post_attention_layernorm"):
                    held[f"{prefix}.{name}.weight"] = _dense(WIDTH)
            yield held

    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files()):
        file = folder / f"model-{number:05}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=32, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    quantization = {
        "quant_method": "auto-round", "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym,
        "data_type": "int", "packing_format": scheme.packing_format, "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": quantization}))
    return sum(file.stat().st_size for file in _files(folder))


def measure(what: str, cache: str, folder: Path) -> dict[str, Any]:
    """Read the files, or load them with a backend; runs in a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (its time is not the loader's)

    from quantkit_runtime import load_model

    files = _files(folder)
    for file in files:
        if cache == "cold":
            _drop(file)
        else:
            _read(file)
    before = _read_from_disk()
    began = time.perf_counter()
    if what == "read":
        for file in files:
            _read(file)
    else:
        model = load_model(folder, backend=what)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.view(-1).view(torch.uint8)[::_PAGE].sum()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "from_disk": _read_from_disk() - before}


def print_table(result: dict[str, Any]) -> None:
    """Print what was measured."""
    print(f"{result['bytes'] / 1e9:.2f} GB, {result['host']}, torch {result['versions']['torch']}\n")
    print("| page cache | what | seconds, median | least | from the disk | times reading, median | least |")
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        share = row["from_disk"] / result["bytes"]
        print(
            f"| {row['cache']} | {row['what']} | {row['median_s']:.2f} | {row['least_s']:.2f} | {share:.0%} "
            f"| {row['ratio']:.2f} | {row['least_ratio']:.2f} |"
        )


def _run(what: str, cache: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", what, cache, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(cache: str, what: str, runs: list[dict[str, Any]], reads: list[dict[str, Any]]) -> dict[str, Any]:
    times, read = ([run["seconds"] for run in found] for found in (runs, reads))
    return {
        "cache": cache,
        "what": what,
        "median_s": statistics.median(times),
        "least_s": min(times),
        "from_disk": statistics.median(run["from_disk"] for run in runs),
        "ratio": statistics.median(times) / statistics.median(read),
        "least_ratio": min(times) / min(read),
        "seconds": times,
    }


def _packed(in_features: int, out_features: int, scheme: Scheme, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for name, (shape, dtype) in packed_tensors(in_features, out_features, scheme).items():
        tensor = tensors[name] = torch.empty(shape, dtype=dtype)
        if name == "qweight":
            tensor.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name == "qzeros":
            tensor.fill_(0x77777777)
        else:
            tensor.fill_(0.001)
    return tensors


def _dense(*shape: int) -> Tensor:
    return torch.full(shape, 0.01, dtype=torch.bfloat16)


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _drop(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not written yet stays
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: Path) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def _read_from_disk() -> int:
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io has no read_bytes")


if __name__ == "__main__":
    main()
