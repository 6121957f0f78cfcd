"""How long-running steps tell their caller where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["check", "load", "fingerprint", "calibrate", "resume", "tune", "round", "write", "verify", "hash"]


@dataclass(frozen=True)
class Progress:
    """One step of a stage is done.

    Attributes:
        stage: Which part of the run.
        done: Units finished so far.
        total: Units in all; 0 when the stage cannot tell.
        detail: What is worked on now, e.g. a block's name.
        result: What came out of the unit just done, e.g. a block's loss.
    """

    stage: Stage
    done: int
    total: int
    detail: str = ""
    result: str = ""


OnProgress = Callable[[Progress], None]
OnNotice = Callable[[str], None]
"""Told, in one line, of what a user should know and need not act on."""


def ignore(_news: Progress | str) -> None:
    """Show nothing."""
