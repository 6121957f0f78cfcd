"""A long call that gives way between its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class StoppedError(BaseException):
    """Raised out of `Turns.give_way` to end the call; library code must not take it for an error."""


class Turns(Generic[T]):
    """Runs a library's call a step at a time, beside other work of the same thread.

    The call has a thread of its own, but never runs at the same time as the caller of `step`: the two take turns.
    So what they share, such as a model's modules, needs no lock.

    Args:
        call: Gets `give_way`, which it calls wherever it can wait.
    """

    def __init__(self, call: Callable[[Callable[[], None]], T]) -> None:
        self._call = call
        # A thread begins on the first accelerator, whatever that of its starter.
        self._place = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._ours = threading.Semaphore(0)
        self._theirs = threading.Semaphore(0)
        self._is_stopped = False
        self._has_ended = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)
        self._thread.start()

    def step(self) -> bool:
        """Let the call go on until it gives way or ends; return whether it has ended.

        Raises:
            Exception: What the call raised.
        """
        if not self._has_ended:
            self._theirs.release()
            self._ours.acquire()
        if self._error is not None:
            raise self._error
        return self._has_ended

    @property
    def result(self) -> T:
        """What the call returned, once it has ended."""
        assert self._has_ended
        assert self._error is None
        return self._result  # type: ignore[return-value]  # T may be optional itself

    def stop(self) -> None:
        """End the call where it waits."""
        if not self._has_ended:
            self._is_stopped = True
            self._theirs.release()
            self._ours.acquire()
        self._thread.join()

    def _run(self) -> None:
        self._theirs.acquire()
        try:
            if not self._is_stopped:
                with torch.accelerator.device_index(self._place):
                    self._result = self._call(self._give_way)
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001  (handed to the other thread)
            self._error = error
        self._has_ended = True
        self._ours.release()

    def _give_way(self) -> None:
        self._ours.release()
        self._theirs.acquire()
        if self._is_stopped:
            raise StoppedError
