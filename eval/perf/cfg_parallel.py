"""What running both guidance branches at once gains, and what it costs.

Measures denoising steps under true classifier-free guidance, with the same resources for every rank, in four ways:
both branches on one rank; one branch on each of two; BF16 weights shared by all ranks (tensor parallelism), the
branches one after the other; and W4A16 weights shared by half of the ranks, a branch on each half. The last two are
what the memory that 4-bit weights free is good for::

    python eval/perf/cfg_parallel.py --output cfg-parallel.json            # embedded model, two CPU ranks
    python eval/perf/cfg_parallel.py --ranks 4                             # on four
    python eval/perf/cfg_parallel.py --predict                             # from counts, for devices not at hand
    python eval/perf/cfg_parallel.py --device cuda --model full-flux       # full size, random weights, 1024 x 1024

Needs quantkit-runtime and diffusers alone (``PYTHONPATH=runtime`` will do); the embedded model is read by its path,
and needs transformers and accelerate, too. On an accelerator every rank takes one, with nccl or xccl; where there
are fewer, ranks share them through gloo, which shows that it works but not how fast it is.

Beside the time of a step stands the time in it of broadcasts and sums over ranks, waiting for the others included.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guidance_models import DEMO
from guidance_ranks import measure
from guidance_table import print_table
from guidance_ways import Settings, Variant, variants
from rounding import round_component


def main() -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "full-flux"), default="demo")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu (default cpu)")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="of the last two ways (default 2)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 20, of full-flux 6)")
    parser.add_argument("--rounds", type=int, help="generations, one more to warm up (default 6, of full-flux 3)")
    parser.add_argument("--size", type=int, help="pixels of a side (default 64, of full-flux 1024)")
    parser.add_argument("--layers", type=int, help="of full-flux: double and single blocks, fewer than published")
    parser.add_argument("--compute", default="auto", help="of packed layers: auto, 16bit or fp8")
    parser.add_argument("--backend", default="auto", help="kernels of packed layers")
    parser.add_argument("--compile", action="store_true", help="compile the blocks; the exchange is not timed then")
    parser.add_argument("--predict", action="store_true", help="measure nothing: print the model of link_model.py")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.predict:
        from link_model import print_tables

        print_tables()
        return
    full = options.model == "full-flux"
    settings = Settings(
        options.model,
        options.device,
        options.steps or (6 if full else 20),
        options.rounds or (3 if full else 6),
        options.size or (1024 if full else 64),
        options.compute,
        options.backend,
        options.compile,
        options.layers,
    )
    runs = run_all(settings, variants(options.ranks))
    print_table(runs, settings, variants(options.ranks))
    if options.output is not None:
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {runs[next(iter(runs))]['device']}",
            "versions": versions(),
            "settings": asdict(settings),
            "runs": runs,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return those of the libraries that are installed."""
    found = {}
    for name in ("torch", "triton", "diffusers", "quantkit", "quantkit-runtime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run_all(settings: Settings, ways: list[Variant]) -> dict[str, Any]:
    """Measure every variant in the same processes; return what the first rank found."""
    from quantkit_runtime.parallel.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        if settings.model == "demo":
            blocks = ("transformer_blocks", "single_transformer_blocks")
            packed = Path(folder, "packed")
            shutil.copytree(DEMO, packed, ignore=shutil.ignore_patterns("transformer"))
            round_component(DEMO / "transformer", packed / "transformer", blocks)
        launch(measure, (folder, settings, ways), max(way.ranks for way in ways))
        found: dict[str, Any] = json.loads(Path(folder, "rank0.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
