"""What the performance scripts share: clocks, peak memory, the record of the machine, rows that survive a kill."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plotting import line_chart

PUBLISHED = Path(__file__).resolve().parents[2] / "quantkit" / "families" / "published"
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "quantkit-runtime")


def published(model: str, file: str) -> dict[str, Any]:
    """Return a published configuration, e.g. of ``Wan-AI/Wan2.2-T2V-A14B-Diffusers``, ``vae/config.json``."""
    config: dict[str, Any] = json.loads((PUBLISHED / model / file).read_text(encoding="utf-8"))
    return config


@dataclass(frozen=True)
class Timing:
    """Distribution of the time of a call, in milliseconds.

    Attributes:
        median_ms: Median.
        p10_ms: A tenth of the calls are faster.
        p90_ms: A tenth are slower.
        count: Calls measured.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Summarize measured times, at least two."""
        tenths = statistics.quantiles(times_ms, n=10, method="inclusive")
        return cls(statistics.median(times_ms), tenths[0], tenths[-1], len(times_ms))


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> Timing:
    """Time single calls by device events, without a synchronization between them.

    Args:
        calls: Called in turn, so that inputs and weights change from call to call. They must be warm.
        device: Where they run.
        seconds: Roughly how long to measure.
        least: Measure at least so many calls, however long they take.
        most: Measure no more calls than that.
    """
    synchronize(device)
    began = time.perf_counter()
    calls[0]()
    synchronize(device)
    once = max(time.perf_counter() - began, 1e-6)
    count = max(least, min(most, round(seconds / once)))
    if device.type == "cpu":
        return Timing.of([_wall_ms(calls[index % len(calls)]) for index in range(count)])
    events = [[torch.Event(device, enable_timing=True) for _ in range(2)] for _ in range(count)]
    for index, (start, end) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        end.record()
    synchronize(device)
    return Timing.of([start.elapsed_time(end) for start, end in events])


def time_graph(
    calls: Sequence[Callable[[], object]], device: torch.device, *, seconds: float, most: int = 200
) -> Timing:
    """Time calls without the cost of launching them: all captured in one CUDA graph, its replays timed.

    Args:
        calls: Each is captured once, in this order; they must be warm, and free of host synchronization.
        device: A CUDA device.
        seconds: Roughly how long to measure.
        most: Replay no more often than that.

    Returns:
        The time of one call; the distribution is that of the replays' means.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    replays = time_calls([graph.replay], device, seconds=seconds, most=most)
    share = 1 / len(calls)
    return Timing(replays.median_ms * share, replays.p10_ms * share, replays.p90_ms * share, replays.count)


def time_graphs(
    variants: Mapping[str, Sequence[Callable[[], object]]], *, seconds: float, most: int = 100
) -> dict[str, Timing]:
    """Time several variants as `time_graph` does, their replays in turn.

    A card that is hot or short of power slows down from one second to the next; in turn, all variants see the same.

    Args:
        variants: Calls by name; they must be warm, and free of host synchronization.
        seconds: Roughly how long to measure all of them together.
        most: Replay no graph more often than that.

    Returns:
        The time of one call by name.
    """
    graphs = {}
    for name, calls in variants.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    began = time.perf_counter()
    for graph in graphs.values():
        graph.replay()
    torch.cuda.synchronize()
    rounds = max(5, min(most, round(seconds / max(time.perf_counter() - began, 1e-6))))
    pairs: dict[str, list[list[torch.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            pairs[name].append([start, end])
    torch.cuda.synchronize()
    return {
        name: Timing.of([start.elapsed_time(end) / len(variants[name]) for start, end in events])
        for name, events in pairs.items()
    }


def warm_up(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Run every call, at least two in all; return the seconds that the first one took."""
    began = time.perf_counter()
    calls[0]()
    synchronize(device)
    first = time.perf_counter() - began
    for call in calls[1:] or calls:
        call()
    synchronize(device)
    return first


def _wall_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing refers to, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def allocated_bytes(device: torch.device) -> int | None:
    """Return what tensors on an accelerator take; None on a CPU, which keeps no such count."""
    return None if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most that tensors took since the last reset; None on a CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference relative to the norm of the reference, in float64."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())


def reason(error: BaseException) -> str:
    """Return the first line of an error, as a row of the table shows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def machine(device: torch.device) -> dict[str, Any]:
    """Return date, command, hardware and versions."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": str(device),
        "host": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        record |= {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    if device.type == "cuda":
        record |= {"cuda": torch.version.cuda, "driver": _driver()}
    return record


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "quantkit-runtime":
            return None
        import quantkit_runtime  # on the path, not installed

        return quantkit_runtime.__version__


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


class Budget:
    """Wall-clock time that the rows of a table may take together."""

    def __init__(self, seconds: float | None) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def spent(self) -> bool:
        """Whether no further row should begin."""
        return self._seconds is not None and time.monotonic() - self._began > self._seconds

    def log(self, text: str) -> None:
        """Tell on standard error what happens now."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Column:
    """A column of the printed table: key in a row, heading, format of a number, width; at 0 the text is last."""

    key: str
    heading: str
    form: str = ""
    width: int = 10

    def cell(self, row: dict[str, Any]) -> str:
        """Return the text of a row's cell, empty where the row has no value."""
        value = row.get(self.key)
        text = "" if value is None else format(value, self.form if isinstance(value, int | float) else "")
        return f"{text:>{self.width}}" if self.width else f"  {text}"


class Report:
    """Rows, printed as they come and written as they come: a run that is killed keeps what it had.

    Args:
        title: What is measured.
        columns: Of the printed table.
        options: With ``device``, ``output`` and ``plot``.
        chart: Makes title, x label, x positions and series of the plot from the rows; see `line_chart`.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        options: argparse.Namespace,
        chart: Callable[[list[dict[str, Any]]], tuple[str, list[str], dict[str, dict[str, float]]]],
    ) -> None:
        self._title = title
        self._columns = columns
        self._output: Path | None = options.output
        self._plot: Path | None = options.plot
        self._chart = chart
        self.rows: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {"title": title, "machine": machine(torch.device(options.device))}
        print(f"{title}: {json.dumps(self.record['machine'])}")
        print("".join(column.cell({column.key: column.heading}) for column in columns), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep a row; a `Timing` under ``time`` is spread out into keys of its own."""
        timing = row.pop("time", None)
        self.rows.append({**row, **(asdict(timing) if timing is not None else {})})
        print("".join(column.cell(self.rows[-1]) for column in self._columns), flush=True)
        self.save()

    def save(self) -> None:
        """Write the files anew."""
        if self._output is not None:
            _write(self._output, json.dumps({**self.record, "rows": self.rows}, indent=1) + "\n")
        if self._plot is not None:
            x_label, positions, series = self._chart([row for row in self.rows if "median_ms" in row])
            if series:
                _write(self._plot, line_chart(self._title, x_label, "ms", positions, series))


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def common_options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument(
        "--device", default=str(best or "cpu"), help="where to run (default: accelerator, else CPU)"
    )
    parser.add_argument("--backend", default="auto", help="kernel backend of packed layers (default auto)")
    parser.add_argument("--row-s", type=float, default=5.0, help="seconds to measure a row (default 5)")
    parser.add_argument("--budget-s", type=float, help="begin no row after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights: does the script itself work?")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    return parser


def choices(*known: str) -> Callable[[str], list[str]]:
    """Return a reader of a comma-separated list of some of the known words; it gives them in the known order."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        unknown = [word for word in words if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return [word for word in known if word in words]

    return read


def numbers(text: str) -> list[int]:
    """Read a comma-separated list of positive integers."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{min(values)} is not positive")
    return values
