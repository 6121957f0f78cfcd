"""How much faster a guided generation is on two ranks than on one, with equal resources per rank.

Draws the same prompts with the embedded model, first on one rank, then with both guidance branches on two; every
rank has one core::

    python eval/perf/cfg_parallel.py --output cfg-parallel.json

Beside the time of a step stands the time that a rank spends in the exchange, waiting for the other included.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = ("a large red circle at the center on white", "a small blue square at the top on black")
WARM_UP = 1


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--rounds", type=int, default=6, help="generations, one more to warm up (default 6)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    from quantkit_runtime.parallel.launch import launch

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks in (("one rank", 1), ("two ranks", 2)):
            launch(measure, (folder, options.steps, options.rounds), ranks)
            runs[name] = json.loads(Path(folder, "rank0.json").read_text(encoding="utf-8"))
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, one core per rank",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "quantkit")},
        "steps": options.steps,
        "runs": runs,
    }
    print_table(runs, options.steps)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(folder: str, steps: int, rounds: int) -> None:
    """Run in a rank: generate, and leave the times of the first rank in a file."""
    import torch
    import torch.distributed as dist

    import quantkit.demo
    from quantkit_runtime import load_pipeline
    from quantkit_runtime.parallel import CfgParallel
    from quantkit_runtime.parallel.launch import device_of_rank, joined

    torch.set_num_threads(1)
    with joined(device_of_rank("cpu")):
        pipe = load_pipeline(quantkit.demo.path())
        pipe.set_progress_bar_config(disable=True)
        call = CfgParallel(pipe) if dist.get_world_size() == 2 else pipe
        clock = Clock()
        with clock.watching_exchange():
            for round_ in range(rounds + WARM_UP):
                clock.start(count=round_ >= WARM_UP)
                call(
                    prompt=list(PROMPTS), height=64, width=64, num_inference_steps=steps, max_sequence_length=48,
                    negative_prompt="", true_cfg_scale=2.0, generator=torch.Generator().manual_seed(round_),
                    callback_on_step_end=clock.step, output_type="latent",
                )  # fmt: skip
        if dist.get_rank() == 0:
            Path(folder, "rank0.json").write_text(json.dumps(clock.times()), encoding="utf-8")


class Clock:
    """Times of steps, the first of each generation apart, and of the exchange in them."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._later: list[float] = []
        self._exchange: list[float] = []
        self._spent = self._began = 0.0
        self._count = self._is_first = False

    def start(self, *, count: bool) -> None:
        """Begin a generation."""
        self._count, self._is_first = count, True
        self._began, self._spent = time.perf_counter(), 0.0

    def step(self, _pipeline: Any, _index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        """End a step."""
        now = time.perf_counter()
        if self._count:
            (self._first if self._is_first else self._later).append((now - self._began) * 1e3)
            if not self._is_first:
                self._exchange.append(self._spent * 1e3)
        self._is_first, self._began, self._spent = False, now, 0.0
        return {}

    @contextlib.contextmanager
    def watching_exchange(self) -> Iterator[None]:
        """Add up the time in broadcasts."""
        import torch.distributed as dist

        broadcast = dist.broadcast

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return broadcast(*args, **kwargs)
            finally:
                self._spent += time.perf_counter() - began

        dist.broadcast = timed
        yield
        dist.broadcast = broadcast

    def times(self) -> dict[str, dict[str, float]]:
        """Return median and 10 to 90 % range, in milliseconds."""
        return {
            name: {"median": statistics.median(values), "p10": tenths(values)[0], "p90": tenths(values)[-1]}
            for name, values in (("first", self._first), ("later", self._later), ("exchange", self._exchange))
        }


def tenths(values: list[float]) -> list[float]:
    """Return the nine values that cut a distribution into ten equal parts."""
    return statistics.quantiles(values, n=10, method="inclusive")


def print_table(runs: dict[str, Any], steps: int) -> None:
    """Print both runs and their ratio."""
    print(f"{'':12}{'step, ms':>10}{'10 to 90 %':>16}{'exchange, ms':>14}")
    for name, run in runs.items():
        later = run["later"]
        spread = f"{later['p10']:.1f} to {later['p90']:.1f}"
        print(f"{name:12}{later['median']:10.1f}{spread:>16}{run['exchange']['median']:14.2f}")
    one, two = runs["one rank"]["later"]["median"], runs["two ranks"]["later"]["median"]
    whole = one * steps / (runs["two ranks"]["first"]["median"] + two * (steps - 1))
    print(f"a step on two ranks is {one / two:.2f} times faster, {steps} steps with the first {whole:.2f} times")


if __name__ == "__main__":
    main()
