"""Up to how many rows the fused kernel is faster than unpacking a weight and multiplying densely.

That depends on the card: on how its arithmetic compares with its memory. `measure` finds it on a device that is
here, `save` keeps it for this user; else the table below says it, as measured by ``eval/perf/gemm.py``.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

FUSED_ROWS = {
    "NVIDIA H100 80GB HBM3": 128,
}
DEFAULT_FUSED_ROWS = 128


def fused_rows(device: torch.device) -> int:
    """Return the largest number of rows for the fused kernel on a device."""
    name = device_name(device)
    return _saved(cache_file()).get(name, FUSED_ROWS.get(name, DEFAULT_FUSED_ROWS))


def device_name(device: torch.device) -> str:
    """Return the name of a device as its driver gives it."""
    if device.type not in ("cuda", "xpu"):
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def cache_file() -> Path:
    """Return the file of this user's measurements."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "quantkit", "crossover.json")


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
