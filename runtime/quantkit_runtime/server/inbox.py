"""The engine's end of the pipe: messages in the order in which the parent sent them, the same on all ranks."""

from __future__ import annotations

import os
import threading
from collections import deque
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from quantkit_runtime.server.protocol import Ping, Pong

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
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def agree_with(self, group: dist.ProcessGroup) -> None:
        """Let all ranks of this group take the same messages at the same step."""
        self._group = group

    def send(self, message: Any) -> None:
        """Send to the parent; the process ends if it is gone."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)

    def wait(self) -> Any:
        """Return the next message, as soon as there is one."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._messages)
            return self._messages.popleft()

    def drain(self) -> list[Any]:
        """Return the messages that are here; on several ranks those that the first one has."""
        count = len(self._messages)
        if self._group is not None:
            count = self._agree(count)
        return [self.wait() for _ in range(count)]

    def _agree(self, count: int) -> int:
        import torch
        import torch.distributed as dist

        agreed = torch.tensor([count])
        dist.broadcast(agreed, group=self._group, group_src=0)
        return int(agreed)

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
