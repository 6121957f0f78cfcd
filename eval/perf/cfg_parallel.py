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
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "quantkit" / "demo" / "pipeline"
PROMPTS = ("a large red circle at the center on white", "a small blue square at the top on black")
WARM_UP = 1
GROUP_SIZE = 128


@dataclass(frozen=True)
class Variant:
    """One way to run the same steps.

    Attributes:
        name: For the table.
        packed: W4A16 instead of BF16 weights.
        cfg: Branches at the same time.
        tensor: Ranks that share the weights of one branch.
    """

    name: str
    packed: bool
    cfg: int
    tensor: int

    @property
    def ranks(self) -> int:
        """Ranks that take part."""
        return self.cfg * self.tensor


@dataclass(frozen=True)
class Settings:
    """What is the same for all variants."""

    model: str
    device: str
    steps: int
    rounds: int
    size: int
    compute: str
    backend: str
    compile: bool
    layers: int | None


def variants(ranks: int) -> list[Variant]:
    """Return what is measured on this many ranks; the first is what the others are held against."""
    half = ranks // 2
    return [
        Variant("BF16, one rank", False, 1, 1),
        Variant("BF16, CFG = 2", False, 2, 1),
        Variant(f"BF16, TP = {ranks}, sequential", False, 1, ranks),
        Variant(f"W4A16, TP = {half}, CFG = 2" if half > 1 else "W4A16, CFG = 2", True, 2, half),
    ]


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
            round_weights(DEMO, Path(folder, "packed"))
        launch(measure, (folder, settings, ways), max(way.ranks for way in ways))
        found: dict[str, Any] = json.loads(Path(folder, "rank0.json").read_text(encoding="utf-8"))
    return found


def round_weights(source: Path, target: Path) -> None:
    """Write a pipeline with the Linears of its transformer's blocks rounded to nearest, 4 bit in groups of 128."""
    from safetensors.torch import load_file, save_file

    from quantkit_runtime.config import Scheme
    from quantkit_runtime.format import pack
    from quantkit_runtime.rounding import quantize_rtn

    shutil.copytree(source, target)
    scheme = Scheme(group_size=GROUP_SIZE)
    file, config = target / "transformer/diffusion_pytorch_model.safetensors", target / "transformer/config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".weight") and "blocks." in name]:
        if tensors[name].ndim == 2:
            packed = pack(*quantize_rtn(tensors.pop(name), scheme), scheme)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in packed.items()}
    file.unlink()  # a copy may be read-only
    save_file(tensors, file)
    quantization = {
        "quant_method": "auto-round", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": "transformer_blocks,single_transformer_blocks",
    }  # fmt: skip
    described = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": quantization}
    config.unlink()
    config.write_text(json.dumps(described), encoding="utf-8")


def measure(folder: str, settings: Settings, ways: list[Variant]) -> None:
    """Run in a rank: generate in every way, and leave what the first rank found in a file.

    Small models take turns, round by round, so that other work on the machine slows all of them alike; large ones
    are loaded one after the other.
    """
    import torch
    import torch.distributed as dist

    from quantkit_runtime.parallel.launch import device_of_rank, joined

    torch.set_num_threads(1)
    device = device_of_rank(settings.device)
    with joined(device), torch.no_grad():
        runs = {way.name: Run(folder, settings, way, device) for way in ways}
        turns = range(settings.rounds + WARM_UP)
        if settings.model == "demo":
            for run in runs.values():
                run.load()
            for turn in turns:
                for run in runs.values():
                    run.generate(turn)
        else:
            for run in runs.values():
                run.load()
                for turn in turns:
                    run.generate(turn)
                run.unload()
        if dist.get_rank() == 0:
            found = {name: run.found() for name, run in runs.items()}
            Path(folder, "rank0.json").write_text(json.dumps(found), encoding="utf-8")


class Run:
    """One variant on this rank; ranks that it has no use for wait."""

    def __init__(self, folder: str, settings: Settings, way: Variant, device: Any) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        self._folder, self._settings, self._way, self._device = folder, settings, way, device
        ranks = torch.arange(way.ranks).view(way.cfg, way.tensor)
        self._mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("cfg", "tensor"))
        self._takes_part = dist.get_rank() < way.ranks
        self._clock = Clock(device, watch=not settings.compile)
        self._weight_bytes = 0
        self._peak_bytes: int | None = None

    def load(self) -> None:
        """Load the model."""
        from quantkit_runtime.parallel import parallel_call

        reset_peak(self._device)
        if not self._takes_part:
            return
        pipe, self._arguments = load(self._folder, self._settings, self._way, self._device, self._mesh)
        if self._settings.compile:
            pipe.transformer.compile_repeated_blocks()
        self._call = parallel_call(pipe, self._mesh) if self._way.ranks > 1 else pipe
        self._weight_bytes = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())

    def generate(self, turn: int) -> None:
        """Generate once; the first turn warms up."""
        import torch
        import torch.distributed as dist

        if self._takes_part:
            size = self._settings.size
            self._clock.start(count=turn >= WARM_UP)
            with self._clock.watching_exchange():
                latents = self._call(
                    **self._arguments, height=size, width=size, num_inference_steps=self._settings.steps,
                    true_cfg_scale=2.0, generator=torch.Generator().manual_seed(turn),
                    callback_on_step_end=self._clock.step, output_type="latent",
                ).images  # fmt: skip
            if not bool(latents.isfinite().all()):
                raise ValueError(f"{self._way.name}: the latents are not finite")
        dist.barrier()

    def unload(self) -> None:
        """Let go of the model."""
        import torch

        self._peak_bytes = peak_bytes(self._device)
        self._call = self._arguments = None
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()

    def found(self) -> dict[str, Any]:
        """Return times and sizes, JSON-ready."""
        import torch.distributed as dist

        return {
            "times": self._clock.times(),
            "rounds_ms": self._clock.rounds(),
            "weight_bytes": self._weight_bytes,
            "peak_bytes": self._peak_bytes,
            "device": name_of(self._device),
            "collectives": dist.get_backend(),
        }


def load(folder: str, settings: Settings, way: Variant, device: Any, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline and what it is to draw, as arguments of its call."""
    shared = mesh["tensor"].get_group() if way.tensor > 1 else None
    if settings.model == "full-flux":
        from random_flux import build_pipeline, inputs

        pipe = build_pipeline(
            device, shared, packed=way.packed, compute=settings.compute, backend=settings.backend,
            layers=settings.layers,
        )  # fmt: skip
        return pipe, inputs(pipe, device)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from quantkit_runtime import load_pipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = load_pipeline(
        Path(folder, "packed") if way.packed else DEMO, device=device, compute=settings.compute,
        backend=settings.backend, tensor_parallel=shared,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": list(PROMPTS), "negative_prompt": "", "max_sequence_length": 48}


def reset_peak(device: Any) -> None:
    """Begin to measure the most memory anew."""
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_bytes(device: Any) -> int | None:
    """Return the most memory that tensors of this process took on an accelerator."""
    import torch

    return None if device.type == "cpu" else int(torch.get_device_module(device).max_memory_allocated(device))


def name_of(device: Any) -> str:
    """Return what the device is called."""
    import torch

    if device.type == "cpu":
        return "one CPU core per rank"
    return str(torch.get_device_module(device).get_device_name(device))


class Clock:
    """Times of steps, the first of each generation apart, and of the exchange in them.

    Args:
        device: Of the rank; a step ends when the device has done its work.
        watch: Whether the exchange is timed, too.
    """

    def __init__(self, device: Any, *, watch: bool) -> None:
        self._device = device
        self._watch = watch
        self._first: list[float] = []
        self._later: list[float] = []
        self._exchange: list[float] = []
        self._marks: list[tuple[Any, Any]] = []
        self._rounds: list[list[float]] = []
        self._began = 0.0
        self._count = self._is_first = False

    def start(self, *, count: bool) -> None:
        """Begin a generation."""
        self._count, self._is_first = count, True
        if count:
            self._rounds.append([])
        self._began = self._now()
        self._marks.clear()

    def step(self, _pipeline: Any, _index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        """End a step."""
        now = self._now()
        if self._count:
            (self._first if self._is_first else self._later).append((now - self._began) * 1e3)
            if not self._is_first:
                self._rounds[-1].append((now - self._began) * 1e3)
                self._exchange.append(sum(self._elapsed_ms(*mark) for mark in self._marks))
        self._marks.clear()
        self._is_first, self._began = False, self._now()
        return {}

    @contextlib.contextmanager
    def watching_exchange(self) -> Iterator[None]:
        """Mark where collectives begin and end."""
        import torch.distributed as dist

        if not self._watch:
            yield
            return
        originals = {name: getattr(dist, name) for name in ("broadcast", "all_reduce")}

        def timed(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                began = self._mark()
                try:
                    return original(*args, **kwargs)
                finally:
                    self._marks.append((began, self._mark()))

            return call

        for name, original in originals.items():
            setattr(dist, name, timed(original))
        yield
        for name, original in originals.items():
            setattr(dist, name, original)

    def _now(self) -> float:
        import torch

        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _mark(self) -> Any:
        """Return a moment of the device's own time, which collectives keep waiting."""
        import torch

        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _elapsed_ms(self, began: Any, ended: Any) -> float:
        return (ended - began) * 1e3 if self._device.type == "cpu" else float(began.elapsed_time(ended))

    def rounds(self) -> list[float]:
        """Return the median step of every generation, the first step aside, in milliseconds."""
        return [statistics.median(steps) for steps in self._rounds]

    def times(self) -> dict[str, dict[str, float]]:
        """Return median and 10 to 90 % range, in milliseconds."""
        return {
            name: {"median": statistics.median(values), "p10": tenths(values)[0], "p90": tenths(values)[-1]}
            for name, values in (("first", self._first), ("later", self._later), ("exchange", self._exchange))
        }


def tenths(values: list[float]) -> list[float]:
    """Return the nine values that cut a distribution into ten equal parts."""
    return statistics.quantiles(values if len(values) > 1 else values * 2, n=10, method="inclusive")


def print_table(runs: dict[str, Any], settings: Settings, ways: list[Variant]) -> None:
    """Print every variant, and how much faster the second is than the first and the fourth than the third."""
    device = runs[ways[0].name]["device"]
    print(f"{settings.model}, {settings.size} x {settings.size}, true CFG, {settings.steps} steps; {device}")
    print(f"{'':28}{'step, ms':>10}{'10 to 90 %':>18}{'exchange':>10}{'weights, GB':>13}{'peak, GB':>10}")
    for name, run in runs.items():
        later = run["times"]["later"]
        spread = f"{later['p10']:.1f} to {later['p90']:.1f}"
        share = run["times"]["exchange"]["median"] / later["median"]
        exchange = "-" if settings.compile else f"{share:.1%}"
        peak = "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.2f}"
        print(
            f"{name:28}{later['median']:10.1f}{spread:>18}{exchange:>10}{run['weight_bytes'] / 1e9:13.3f}{peak:>10}"
        )
    for before, after in ((ways[0], ways[1]), (ways[2], ways[3])):
        low, middle, high = ratios(runs[before.name]["rounds_ms"], runs[after.name]["rounds_ms"])
        one, two, steps = runs[before.name]["times"], runs[after.name]["times"], settings.steps
        whole = (one["first"]["median"] + one["later"]["median"] * (steps - 1)) / (
            two["first"]["median"] + two["later"]["median"] * (steps - 1)
        )
        print(
            f"{after.name} against {before.name}: a step {middle:.2f} times faster ({low:.2f} to {high:.2f}), "
            f"{steps} steps with the first {whole:.2f} times"
        )


def ratios(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Return 10 %, median and 90 % of the ratios of every round of one to the same round of the other."""
    found = [one / two for one, two in zip(before, after, strict=True)]
    return tenths(found)[0], statistics.median(found), tenths(found)[-1]


if __name__ == "__main__":
    main()
