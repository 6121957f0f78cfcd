"""The two consoles: results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


# Columns of output that goes to a file or a pipe: wide enough that no table is cut.
_PLAIN_WIDTH = 140


class _Lazy:
    """A rich console that is made at its first use, so that ``--help`` need not import it."""

    def __init__(self, *, stderr: bool) -> None:
        self._stderr = stderr

    @functools.cached_property
    def console(self) -> Console:
        """The console itself."""
        from rich.console import Console

        console = Console(stderr=self._stderr)
        if not console.is_terminal:
            console.width = _PLAIN_WIDTH
        return console

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


output = _Lazy(stderr=False)
errors = _Lazy(stderr=True)


def show_log(name: str) -> None:
    """Show what a library logs while it works, as notes on standard error."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.print(f"note: {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)

    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [Notes()]


def new_table(title: str, *headers: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table in the style of all tables here.

    Args:
        title: Above it; empty for none.
        headers: Of the columns.
        right: Those of the columns that are aligned to the right.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),  # two blanks between columns: every column counts on a terminal of 80
    )
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def gigabytes(nbytes: float) -> str:
    """Return a size for people: GB with two digits, MB below a tenth of one."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
