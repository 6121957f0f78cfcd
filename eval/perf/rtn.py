"""How much memory and time rounding to nearest takes, beside a plain copy of the same bytes.

Makes a FLUX pipeline of random weights in many shards, quantizes it with the command line, removes it all again::

    python eval/perf/rtn.py --gigabytes 12 --output rtn.json

Needs 2.6 times that space in ``--folder``. Every run starts with the source out of the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Runs a command line of quantkit and notes the largest resident set it ever had, mapped files and all.
MEASURED = """
import atexit, json, pathlib, sys, time
from quantkit.cli.main import main
target = pathlib.Path(sys.argv.pop(1))
@atexit.register
def note():
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    noted = {"peak_rss_kib": int(status["VmHWM"].split()[0]), "cpu_s": round(time.process_time(), 2)}
    target.write_text(json.dumps(noted))
main()
"""
PIECE_BYTES = 64 * 2**20


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the checkpoint (default 12)")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0, help="size of its shards (default 1)")
    parser.add_argument("--heads", type=int, default=24, help="width in heads of 128 (default 24, as FLUX.1)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="quantkit-rtn-", dir=options.folder) as folder:
        result = measure(Path(folder), options.gigabytes, options.shard_gigabytes, options.heads)
    print_table(result)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, gigabytes: float, shard_gigabytes: float, heads: int) -> dict[str, object]:
    """Make the checkpoint and run everything once; return seconds, bytes and peak memory."""
    source, output, copy = folder / "source", folder / "output", folder / "copy"
    build(source, round(gigabytes * 1e9), round(shard_gigabytes * 1e9), heads)
    recipe = ["--recipe", "flux", "--model", str(source)]
    seconds = {}
    with timed(seconds, "read", source):
        for path in files(source):
            with path.open("rb", buffering=0) as file:
                while file.read(PIECE_BYTES):
                    pass
    with timed(seconds, "copy", source):
        subprocess.run(["cp", "-r", source, copy], check=True)
        synchronize(copy)
    shutil.rmtree(copy)
    runs = {"dry_run": quantkit(folder, "quantize", *recipe, "--set", "scheme.iters=0", "--dry-run")}
    with timed(seconds, "quantize", source):
        runs["quantize"] = quantkit(folder, "quantize", *recipe, "--set", "scheme.iters=0", "--output", str(output))
    with timed(seconds, "verify", source):
        runs["verify"] = quantkit(folder, "verify", str(output), "--source", str(source))
    with timed(seconds, "write", output):  # of what the quantization has to write: the rest is linked
        subprocess.run(["cp", "-r", output / "transformer", copy], check=True)
        synchronize(copy)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "quantkit")}
        | {"python": platform.python_version()},
        "source": {
            "bytes": size(source),
            "files": len(files(source)),
            "largest_file": max(map(size, files(source))),
        },
        "written": {"bytes": size(copy)},
        "seconds": seconds,
        "runs": runs,
    }


def build(folder: Path, nbytes: int, shard_bytes: int, heads: int) -> None:
    """Write a FLUX pipeline of random bf16 weights; nine tenths are the transformer, the rest one big tensor."""
    import torch

    piece = (torch.randn(PIECE_BYTES // 2) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().data
    shapes, config = transformer(heads, int(nbytes * 0.9))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        count = 2 * torch.Size(shape).numel()
        if shards[-1] and held + count > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += count
    weight_map = {}
    (folder / "transformer").mkdir(parents=True)
    for number, shard in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / "transformer" / name, shard, piece)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "text_encoder_2").mkdir()
    rows = nbytes // 10 // 2 // 4096
    write_shard(folder / "text_encoder_2" / "model.safetensors", {"shared.weight": (rows, 4096)}, piece)
    classes = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    for path, data in {
        "transformer/diffusion_pytorch_model.safetensors.index.json": index,
        "transformer/config.json": config,
        "text_encoder_2/config.json": {},
        "model_index.json": classes,
    }.items():
        (folder / path).write_text(json.dumps(data))
    synchronize(folder)


def transformer(heads: int, nbytes: int) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Return shapes and configuration of the smallest FLUX transformer of at least so many bytes in bf16."""
    import torch
    from diffusers import FluxTransformer2DModel

    blocks = 0
    shapes: dict[str, tuple[int, ...]] = {}
    config: dict[str, object] = {}
    while sum(2 * torch.Size(shape).numel() for shape in shapes.values()) < nbytes:
        blocks += 1  # twice as many single blocks as double ones, as in FLUX.1
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                num_layers=blocks, num_single_layers=2 * blocks, num_attention_heads=heads, guidance_embeds=True
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        config = {**model.config, "_class_name": "FluxTransformer2DModel"}
    return shapes, config


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], piece: memoryview) -> None:
    """Write a safetensors file of bf16 tensors whose bytes are the piece again and again."""
    import torch

    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(piece[: min(end, PIECE_BYTES)])


def quantkit(folder: Path, *arguments: str) -> dict[str, float]:
    """Run the command line; return the most memory it ever held and the processor time of all its threads."""
    noted = folder / "noted"
    subprocess.run([sys.executable, "-c", MEASURED, noted, *arguments], check=True, stdout=2)
    return json.loads(noted.read_text())


@contextmanager
def timed(seconds: dict[str, float], name: str, folder: Path) -> Iterator[None]:
    """Note how long something takes that begins with a folder's files out of the page cache."""
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)


def synchronize(folder: Path) -> None:
    """Bring every file below to disk."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def files(folder: Path) -> list[Path]:
    """Return the files below."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(map(size, files(path))) if path.is_dir() else path.stat().st_size


def print_table(result: dict) -> None:
    """Print what was measured."""
    seconds, runs = result["seconds"], result["runs"]
    read, written = result["source"]["bytes"], result["written"]["bytes"]
    same = seconds["read"] + seconds["write"]
    print(f"source {read / 1e9:.2f} GB in {result['source']['files']} files, written {written / 1e9:.2f} GB")
    print(f"{'':34}{'s':>8}{'MB/s':>8}{'CPU s':>8}{'peak GB':>9}")
    for label, time_s, nbytes, run in (
        ("copy the source (cp, fsync)", seconds["copy"], 2 * read, None),
        ("read it, write as much as below", same, read + written, None),
        ("quantkit quantize", seconds["quantize"], read + written, runs["quantize"]),
        ("quantkit verify --source", seconds["verify"], read + written, runs["verify"]),
        ("quantkit quantize --dry-run", None, None, runs["dry_run"]),
    ):
        rate = f"{time_s:8.1f}{nbytes / 1e6 / time_s:8.0f}" if time_s else " " * 16
        noted = f"{run['cpu_s']:8.1f}{run['peak_rss_kib'] * 1024 / 1e9:9.2f}" if run else ""
        print(f"{label:34}{rate}{noted}")
    print(f"quantize takes {seconds['quantize'] / seconds['copy']:.2f} times the copy of the source,")
    print(f"{seconds['quantize'] / same:.2f} times reading and writing the same bytes")


if __name__ == "__main__":
    main()
