"""The time of denoising steps, and of the exchange between ranks in them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any


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
