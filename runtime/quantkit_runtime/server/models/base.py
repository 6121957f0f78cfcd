"""What a kind of model implements to be served.

A module of a kind has ``load(spec: ModelSpec)``, which returns one of the two classes below. Their methods are
called from the main thread of the engine process, on every rank of a group alike. Only the first rank's events are
sent; that the others have the same is checked before the next step.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantkit_runtime.server.protocol import Event, Frames, ModelInfo, ModelSpec, Request

OnStep = Callable[[int, int], None]
"""Called after each step with its number from 1 and their number; raises `Cancelled` to stop the run there."""


def place_of(spec: ModelSpec) -> tuple[Any, Any]:
    """Return the device of this process, and the mesh of all ranks; no mesh where there is but one.

    Raises:
        ParallelError: There is no such device.
    """
    if spec.ranks == 1:
        return spec.device, None
    from quantkit_runtime.parallel import make_mesh
    from quantkit_runtime.parallel.launch import device_of_rank

    device = device_of_rank(spec.device)
    return device, make_mesh(device, cfg=spec.cfg_parallel, tensor=spec.tensor_parallel)


class Cancelled(Exception):  # noqa: N818  (no error: nobody waits for the result any more)
    """Raised out of a step callback; a model lets it pass through."""


class RequestRefusedError(Exception):
    """A request that this model cannot run, with a reason for the caller and the field it is about."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _Model(ABC):
    """What both kinds have."""

    info: ModelInfo

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Put values of request fields before the model's own."""
        self.info = dataclasses.replace(self.info, defaults={**self.info.defaults, **defaults})

    @abstractmethod
    def warm_up(self) -> None:
        """Run one small request."""


class BatchModel(_Model):
    """Runs requests from start to end, several of one ``batch_key`` together: pictures and videos."""

    @abstractmethod
    def run(self, requests: Sequence[Request], on_step: OnStep) -> list[Frames]:
        """Return the result of each request.

        Raises:
            RequestRefusedError: The model cannot run this.
            Cancelled: As ``on_step`` raised it.
            torch.OutOfMemoryError: The engine frees memory, and runs the requests one by one.
        """


class StreamingModel(_Model):
    """Admits requests while others run, and moves all of them on together: chat, speech, and what draws beside it.

    The engine calls ``step`` again and again while ``active`` is above zero, and between two steps ``admit`` and
    ``cancel``. It never has more than ``info.max_batch`` chats and speeches admitted, and one request for pictures.
    """

    @property
    @abstractmethod
    def active(self) -> int:
        """Number of requests that are admitted and have not ended."""

    @abstractmethod
    def admit(self, request: Request) -> None:
        """Take up a request.

        Raises:
            RequestRefusedError: The model cannot run this, e.g. the prompt is longer than its context.
        """

    @abstractmethod
    def step(self) -> list[Event]:
        """Move all active requests on by one step, and return what came out.

        Events are `Delta` and `Progress`, and at the end of each request one `Finished` (with an `Answer` or
        `Frames`) or `Failed`. An exception fails all active requests; `reset` is called then. On several ranks, or
        if it leaves the device in an unknown state, it ends the process: the others may wait for this one in the
        middle of the step.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Forget an active request; no event follows."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all active requests and what they hold."""
