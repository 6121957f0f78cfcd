"""Following auto-round, which has no callbacks: by its log and its progress bars."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from typing import Any

_LOSS = re.compile(r"loss iter 0: (\S+) -> iter (\d+): (\S+)")
# What auto-round logs, at warning level, when it is about to do something else than it was asked.
_IGNORED = re.compile(
    "will be ignored|is ignored|unrecognized|could not find blocks|not supported|forward pass failed|"
    "insufficient number of samples",
    re.IGNORECASE,
)


class Follower(logging.Handler):
    """Reads losses from auto-round's log, and takes its warnings about things it skips for a refusal."""

    def __init__(self) -> None:
        super().__init__()
        self._loss: tuple[float, float] | None = None
        self.refusal: str | None = None
        self.last_error = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Take notice of a line of the log."""
        message = record.getMessage()
        if match := _LOSS.search(message):
            self._loss = float(match[1]), float(match[3])
        if record.levelno >= logging.WARNING and _IGNORED.search(message) and self.refusal is None:
            self.refusal = message
        if record.levelno >= logging.ERROR:
            self.last_error = message

    def take_loss(self, summed: int) -> tuple[float, float] | None:
        """Return the last block's mean loss before and after, once; None if auto-round logged none."""
        loss, self._loss = self._loss, None
        return loss and (loss[0] / summed, loss[1] / summed)


def silent_bar(on_update: Callable[[int, int], None]) -> type:
    """Return a progress bar class that only tells of each update; auto-round has no callback of its own."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float = 1) -> None:
            super().update(n)
            on_update(int(self.n), int(self.total or 0))

    return Bar
