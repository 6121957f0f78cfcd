"""Showing progress: one bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantkit.cli.console import errors

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """One bar that goes through the stages of a run one after the other.

    Use as a context manager; call it with the stage in words, units done, units in all, what is worked on and what
    came out of the unit just done. The time left is that of the stage, from its mean speed so far; units that were
    done when the stage began do not count.
    """

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._stage_began = 0.0
        self._done_before = 0.0
        self._line_due = 0.0

    def __enter__(self) -> Self:
        if errors.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=errors.console,
                transient=True,
            )
            self._rich.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def __call__(self, stage: str, done: float, total: int, detail: str = "", result: str = "") -> None:
        """Show where the run is."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began, self._done_before = stage, now, done
            self._line_due = now + _SECONDS_BETWEEN_LINES
            if self._rich is not None and self._task is not None:
                self._rich.remove_task(self._task)
                self._task = None
        spent, left = now - self._stage_began, ""
        if self._done_before < done < total:
            left = f"{_clock(spent / (done - self._done_before) * (total - done))} left"
        if self._rich is not None:
            if self._task is None:
                self._task = self._rich.add_task(stage, total=total or None, left="", detail="")
            detail = ": ".join(filter(None, (detail, result)))
            self._rich.update(self._task, completed=done, total=total or None, left=left, detail=detail)
        elif now >= self._line_due or (done == total and total > 0) or result:
            self._line_due = now + _SECONDS_BETWEEN_LINES
            result = f"{detail}: {result}" if result else ""
            more = "".join(f", {text}" for text in (left, result) if text)
            errors.print(f"{stage}: {int(done)}/{total} in {_clock(spent)}{more}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say something that stays, above the bar."""
        errors.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Return a span of time for people: ``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{minutes} min {rest:02} s" if hours < 1 else f"{hours} h {minutes:02} min"
