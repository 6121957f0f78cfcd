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

    Use as a context manager; call it with the stage in words, units done, units in all and a detail.
    """

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._stage_began = 0.0
        self._line_due = 0.0

    def __enter__(self) -> Self:
        if errors.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[detail]}", markup=True),
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

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show where the run is."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began, self._line_due = stage, now, now + _SECONDS_BETWEEN_LINES
            if self._rich is not None and self._task is not None:
                self._rich.remove_task(self._task)
                self._task = None
        if self._rich is not None:
            if self._task is None:
                self._task = self._rich.add_task(stage, total=total or None, detail=detail)
            self._rich.update(self._task, completed=done, total=total or None, detail=detail)
        elif now >= self._line_due or (done == total and total > 0):
            self._line_due = now + _SECONDS_BETWEEN_LINES
            spent = now - self._stage_began
            left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            errors.print(f"{stage}: {done}/{total} in {spent:.0f} s{left}", highlight=False)
