"""BAGEL: one model that answers and draws."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantkit_runtime.generation.turns import Turns
from quantkit_runtime.server.failures import classify, free_memory, is_broken
from quantkit_runtime.server.models.base import StreamingModel
from quantkit_runtime.server.models.chat import ChatModel
from quantkit_runtime.server.models.conversation import Reader
from quantkit_runtime.server.models.diffusion import DiffusionModel, load_parallel
from quantkit_runtime.server.protocol import (
    ChatRequest,
    Event,
    Failed,
    Finished,
    Frames,
    ImageRequest,
    ModelSpec,
    Progress,
    Request,
)

log = logging.getLogger(__name__)


def load(spec: ModelSpec) -> BagelModel:
    """Load a BAGEL.

    Raises:
        QuantkitRuntimeError: It cannot be loaded.
    """
    pipeline, call = load_parallel(spec)
    reader = Reader(Path(spec.path))
    chat = ChatModel(pipeline.transformer.bagel, reader, max_batch=spec.max_batch, exact=spec.exact)
    return BagelModel(chat, DiffusionModel(pipeline, call), is_shared=spec.ranks > 1)


class BagelModel(StreamingModel):
    """Draws one picture at a time, a step of it between two tokens of the answers that are written meanwhile.

    Args:
        chat: Writes.
        drawing: Draws, with the same weights.
        is_shared: Whether other ranks do the same.
    """

    def __init__(self, chat: ChatModel, drawing: DiffusionModel, *, is_shared: bool = False) -> None:
        self._chat = chat
        self._drawing = drawing
        self._is_shared = is_shared
        self._current: _Picture | None = None
        ours, theirs = chat.info, drawing.info
        self.info = dataclasses.replace(
            theirs,
            kinds=ours.kinds | theirs.kinds,
            parameters=ours.parameters | theirs.parameters,
            defaults={**ours.defaults, **theirs.defaults},
            inputs=ours.inputs,
            outputs=ours.outputs,
            max_batch=ours.max_batch,
            description=ours.description,
        )

    @property
    def active(self) -> int:
        """See `StreamingModel.active`."""
        return self._chat.active + (self._current is not None)

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Put values of request fields before the model's own."""
        super().set_defaults(defaults)
        self._chat.set_defaults(defaults)
        self._drawing.set_defaults(defaults)

    def warm_up(self) -> None:
        """Write two tokens, and draw a small picture."""
        self._chat.warm_up()
        self._drawing.warm_up()

    def admit(self, request: Request) -> None:
        """Take up a chat or a request for pictures."""
        if isinstance(request, ImageRequest):
            assert self._current is None
            self._current = _Picture(request, self._drawing)
        else:
            assert isinstance(request, ChatRequest)
            self._chat.admit(request)

    def step(self) -> list[Event]:
        """Write a token of every answer, and draw a step of one picture."""
        events = self._chat.step() if self._chat.active else []
        if self._current is not None:
            events += self._draw(self._current)
        return events

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        self._chat.cancel(request_id)
        if self._current is not None and self._current.request.id == request_id:
            self._stop_drawing()

    def reset(self) -> None:
        """Forget all requests."""
        self._chat.reset()
        self._stop_drawing()

    def _draw(self, picture: _Picture) -> list[Event]:
        try:
            events = picture.step()
        except Exception as error:
            kind, message, param = classify(error)
            if kind != "refused" and (self._is_shared or is_broken(error)):
                raise
            self._current = None
            if kind == "out_of_memory":
                free_memory(error)
            elif kind == "internal":
                log.error("drawing failed", exc_info=error, extra={"request_id": picture.request.id})
            return [Failed(picture.request.id, kind, message, param)]
        if picture.has_ended:
            self._current = None
        return events

    def _stop_drawing(self) -> None:
        if self._current is not None:
            self._current.stop()
            self._current = None


class _Picture:
    """A request for pictures that is being drawn."""

    def __init__(self, request: ImageRequest, drawing: DiffusionModel) -> None:
        self.request = request
        self.has_ended = False
        self._events: list[Event] = []
        self._begin = self._last = time.perf_counter()

        def draw(give_way: Callable[[], None]) -> Frames:
            def on_step(step: int, steps: int) -> None:
                now = time.perf_counter()
                self._events.append(Progress(request.id, step, steps, now - self._last))
                self._last = now
                give_way()

            return drawing.run([request], on_step)[0]

        self._turns: Turns[Frames] = Turns(draw)

    def step(self) -> list[Event]:
        """Draw one step; an exception is one of the model, and ends the picture."""
        self._events = []
        self.has_ended = self._turns.step()
        if self.has_ended:
            seconds = time.perf_counter() - self._begin
            self._events.append(Finished(self.request.id, self._turns.result, seconds, peak_memory_bytes=0))
        return self._events

    def stop(self) -> None:
        """Give up."""
        self._turns.stop()
