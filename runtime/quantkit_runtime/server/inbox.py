"""The engine's end of the pipe: messages in the order in which the parent sent them, and what becomes of them.

Both are the same on all ranks.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from quantkit_runtime.server.protocol import Answer, Delta, Event, Failed, Ping, Pong, Progress

if TYPE_CHECKING:
    import torch.distributed as dist


class Inbox:
    """Receives in a thread, so that a ping is answered while the model runs.

    The process ends when the parent's end of the pipe is closed.

    Attributes:
        active: Number of requests that the engine holds; told to the parent.
    """

    def __init__(self, connection: Connection) -> None:
        self.active = 0
        self._connection = connection
        self._messages: deque[Any] = deque()
        self._arrived = threading.Condition()
        self._sending = threading.Lock()
        self._group: dist.ProcessGroup | None = None
        self._is_first = True
        self._told = 0  # checksum of all events
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def agree_with(self, group: dist.ProcessGroup) -> None:
        """Let all ranks of this group take the same messages at the same step, and tell of the same events."""
        self._group = group
        self._is_first = group.rank() == 0

    def send(self, message: Any) -> None:
        """Send to the parent; the process ends if it is gone."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)

    def tell(self, event: Event) -> None:
        """Send what happened to a request; of several ranks the first one does, and `drain` compares them."""
        self._told = zlib.crc32(repr(_essence(event)).encode(), self._told)
        if self._is_first:
            self.send(event)

    def wait(self) -> Any:
        """Return the next message, as soon as there is one."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._messages)
            return self._messages.popleft()

    def drain(self) -> list[Any]:
        """Return the messages that are here; on several ranks those that the first one has.

        Raises:
            ParallelError: On every rank, if they have not told of the same events.
        """
        count = len(self._messages)
        if self._group is not None:
            from quantkit_runtime.parallel.agreement import agree_on

            count = agree_on(count, self._told, self._group)
        return [self.wait() for _ in range(count)]

    def _receive(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Ping):
                self.send(Pong(self.active))
                continue
            with self._arrived:
                self._messages.append(message)
                self._arrived.notify()


def _essence(event: Event) -> tuple[Any, ...]:
    """Return what must be the same on all ranks: no times, and no pixels and samples, which may round otherwise."""
    if isinstance(event, Progress):
        return event.id, event.step, event.steps
    if isinstance(event, Delta):
        return event.id, event.text, event.tokens, None if event.samples is None else event.samples.size
    if isinstance(event, Failed):
        return event.id, event.kind
    return event.id, event.result if isinstance(event.result, Answer) else event.result.pixels.shape
