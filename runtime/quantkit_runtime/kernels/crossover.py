"""Up to how many rows the fused kernel is faster than unpacking a weight and multiplying densely.

That depends on the card: on how its arithmetic compares with its memory. `measure` finds it on a device that is
here, `save` keeps it for this user; else what was measured elsewhere, below, says it.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch

from quantkit_runtime.kernels import hopper_launch

DEFAULT_FUSED_ROWS = 128
"""Of cards that nobody has measured."""
HOPPER_FUSED_ROWS = 8192
"""Of Hopper GPUs, which have a kernel of their own: the most rows tried on an H200, where it was still faster."""

_SHAPES = ((3072, 3072), (3072, 12288), (5120, 13824))
_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 3072, 4608, 8192)
_GROUP = 128
_ROUNDS = 30


def fused_rows(device: torch.device) -> int:
    """Return the largest number of rows for the fused kernel on a device."""
    unmeasured = HOPPER_FUSED_ROWS if hopper_launch.runs_on(device) else DEFAULT_FUSED_ROWS
    return _saved(cache_file()).get(device_name(device), unmeasured)


def device_name(device: torch.device) -> str:
    """Return the name of a device as its driver gives it."""
    if device.type not in ("cuda", "xpu"):
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def cache_file() -> Path:
    """Return the file of this user's measurements."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "quantkit", "crossover.json")


def measure(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] = _SHAPES,
    rows: Sequence[int] = _ROWS,
    dtype: torch.dtype = torch.bfloat16,
    on_progress: Callable[[int, float, float], None] = lambda _rows, _fused_ms, _unpacked_ms: None,
) -> int:
    """Find the border on a device: the largest number of rows up to which the fused kernel is no slower.

    Takes seconds, most of them to compile the kernels.

    Args:
        device: An accelerator that the Triton kernels run on.
        shapes: K and N of the layers, whose times are added up.
        rows: Numbers of rows to try, ascending.
        dtype: Of the activations.
        on_progress: Called for each with the milliseconds of both ways.

    Returns:
        The border; 0 if the fused kernel is slower for the fewest rows already.
    """
    from quantkit_runtime.kernels import ops
    from quantkit_runtime.kernels.tiles import SLICE, TILE

    layers = []
    for in_features, out_features in shapes:
        tiles = torch.randint(-(2**31), 2**31 - 1, (in_features // TILE, out_features, SLICE), dtype=torch.int32)
        scales = torch.rand(in_features // _GROUP, out_features).to(torch.float16)
        layers.append((tiles.to(device), scales.to(device), ops.counters_for(out_features, device)))
    border = 0
    for count in rows:
        inputs = [torch.randn(count, in_features).to(device, dtype) for in_features, _ in shapes]

        def run(fused_rows: int, inputs: list[torch.Tensor] = inputs) -> None:
            for x, (tiles, scales, counters) in zip(inputs, layers, strict=True):
                ops.linear(x, tiles, scales, None, None, counters, _GROUP, fused_rows)

        fused_ms, unpacked_ms = (_time_ms(partial(run, limit), device) for limit in (count, 0))
        on_progress(count, fused_ms, unpacked_ms)
        if fused_ms > unpacked_ms:
            break
        border = count
    return border


def _time_ms(run: Callable[[], None], device: torch.device) -> float:
    """Return the median time of a call: the device's work, and on NVIDIA's GPUs not that of launching it."""
    run()
    if device.type == "cuda" and torch.version.cuda is not None:
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - began) * 1e3

    once()
    return statistics.median(once() for _ in range(_ROUNDS if device.type != "cpu" else 1))


def save(device: torch.device, rows: int) -> Path:
    """Keep a measurement for this user, beside those of other devices; layers prepared from now on follow it.

    Returns:
        The file.
    """
    path = cache_file()
    _saved.cache_clear()  # another process may have written meanwhile
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps({**_saved(path), device_name(device): rows}, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
    _saved.cache_clear()
    return path


@lru_cache
def _saved(path: Path) -> dict[str, int]:
    """Return the measurements of this user; a damaged file counts as none, the next `save` writes it anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: rows for name, rows in found.items() if isinstance(rows, int)} if isinstance(found, dict) else {}
