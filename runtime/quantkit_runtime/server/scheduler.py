"""A bounded, fair queue in front of one engine: what runs when, with whom, and what becomes of it.

Everything happens in the event loop. A ticket is in exactly one place: waiting, running, or ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from opentelemetry.context import Context

from quantkit_runtime.server import tracing
from quantkit_runtime.server.errors import ApiError, error_of
from quantkit_runtime.server.metrics import Metrics
from quantkit_runtime.server.protocol import (
    Answer,
    Cancel,
    Delta,
    Event,
    Failed,
    FailureKind,
    Finished,
    ImageRequest,
    ModelInfo,
    Progress,
    Request,
    Run,
)
from quantkit_runtime.server.supervisor import EngineGroup

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        request: What to run.
        client: Whose turn it takes; turns go round between clients.
        user: For whom the client asks; its turns go round between its users.
        streams: Whether pieces of the answer are told as they come; else with its end, so that it can begin again.
        events: What happened, ended by `Finished` or `Failed`.
        submitted: When, by ``time.monotonic``.
        place: In the trace of the HTTP request.
        sent: When it was last sent to an engine.
        tries: Times it was sent to an engine.
        wait_s: From the submission until it was first sent.
        pieces: Of the answer, that wait for its end.
        has_output: Whether some of the answer is out.
        has_ended: Whether its last event has come.
        timer: Ends it when its time is up.
    """

    request: Request
    client: str
    user: str = ""
    streams: bool = False
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    place: Context = field(default_factory=tracing.current)
    sent: float | None = None
    tries: int = 0
    wait_s: float | None = None
    pieces: list[Delta] = field(default_factory=list)
    has_output: bool = False
    has_ended: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def draws(self) -> bool:
        """Whether it is for pictures."""
        return isinstance(self.request, ImageRequest)

    @property
    def queue(self) -> tuple[str, bool]:
        """Which queue it waits in: a client's pictures and its chats do not wait for each other."""
        return self.client, self.draws

    def put(self, event: Event) -> None:
        """Tell of an event; nothing follows the end."""
        if self.has_ended:
            return
        if isinstance(event, Delta):
            if not self.streams:
                self.pieces.append(event)
                return
            self.has_output = True
        if isinstance(event, Finished):
            for piece in self.pieces:
                self.events.put_nowait(piece)
        self.has_ended = isinstance(event, (Finished, Failed))
        if self.has_ended and self.timer is not None:
            self.timer.cancel()
        self.events.put_nowait(event)


class Scheduler:
    """Sends requests to an engine.

    Args:
        engine: What runs them.
        metrics: What counts them.
        model: Name of the model in the metrics.
        max_queue: Requests that may wait.
        max_tries: Times a request is sent before it fails with an engine that dies.
    """

    def __init__(
        self,
        engine: EngineGroup,
        metrics: Metrics,
        *,
        model: str,
        max_queue: int,
        max_tries: int = 2,
    ) -> None:
        self.engine = engine
        self._metrics = metrics
        self._model = model
        self._max_queue = max_queue
        self._max_tries = max_tries
        # Of each client by user; on both levels the next turn comes first.
        self._waiting: OrderedDict[tuple[str, bool], OrderedDict[str, deque[Ticket]]] = OrderedDict()
        self._running: dict[str, Ticket] = {}
        self._recent_s: deque[float] = deque(maxlen=16)
        self._closed: str | None = None  # why nothing runs any more
        engine.on_event = self._on_event
        engine.on_ready = self._dispatch
        engine.on_down = self._on_down
        engine.watch_progress_while(lambda: bool(self._running))

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return sum(len(tickets) for users in self._waiting.values() for tickets in users.values())

    @property
    def running(self) -> int:
        """Number of requests in the engine."""
        return len(self._running)

    def submit(
        self,
        request: Request,
        client: str,
        *,
        user: str = "",
        timeout_s: float | None,
        bounded: bool = True,
        streams: bool = False,
    ) -> Ticket:
        """Put a request into the queue.

        Args:
            request: What to run.
            client: Whose turn it takes.
            user: For whom the client asks.
            timeout_s: From now until its end; None for ever.
            bounded: Whether the queue's limit counts.
            streams: Whether pieces of an answer are wanted as they come; one that began is not begun again.

        Raises:
            ApiError: The queue is full (429), closed or of an engine that never came up (503).
        """
        if self._closed is not None:
            raise error_of(Failed(request.id, "stopped", self._closed))
        if self.engine.state in ("failed", "stopped"):
            raise ApiError(503, f"the model does not run: {self.engine.reason}", code="engine_down")
        if bounded and self.waiting >= self._max_queue:
            self._metrics.rejected(self._model)
            raise ApiError(
                429,
                f"the queue is full ({self._max_queue} requests wait); try again later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )
        ticket = Ticket(request, client, user, streams)
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            ticket.timer = loop.call_later(timeout_s, self._time_out, ticket, timeout_s)
        self._queue_of(ticket).append(ticket)
        self._dispatch()
        return ticket

    async def run(
        self, request: Request, client: str, *, user: str = "", timeout_s: float | None
    ) -> tuple[Finished, Ticket]:
        """Run a request to its end; cancelling this coroutine stops it at its next step.

        Raises:
            ApiError: It was refused or failed.
        """
        ticket = self.submit(request, client, user=user, timeout_s=timeout_s)
        async for event in self.follow(ticket):
            if isinstance(event, Finished):
                return event, ticket
        raise AssertionError("a ticket ends with Finished or an exception")

    async def follow(self, ticket: Ticket) -> AsyncGenerator[Progress | Delta | Finished]:
        """Yield the events of a ticket; closing the iterator cancels it.

        Raises:
            ApiError: It failed.
        """
        try:
            while True:
                event = await ticket.events.get()
                if isinstance(event, Failed):
                    raise error_of(event)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Forget a ticket; a running one stops at its next step."""
        if not ticket.has_ended:
            self._stop(ticket, "cancelled", "cancelled")

    def _time_out(self, ticket: Ticket, timeout_s: float) -> None:
        state = "running" if ticket.tries else "waiting"
        self._stop(ticket, "timeout", f"not done within {round(timeout_s, 1):g} s, {state}")

    def _stop(self, ticket: Ticket, kind: FailureKind, message: str) -> None:
        if ticket.request.id in self._running:
            self.engine.send(Cancel(ticket.request.id))
        else:
            self._forget(ticket)
        self._end(ticket, Failed(ticket.request.id, kind, message))

    def _queue_of(self, ticket: Ticket) -> deque[Ticket]:
        return self._waiting.setdefault(ticket.queue, OrderedDict()).setdefault(ticket.user, deque())

    def _forget(self, ticket: Ticket) -> None:
        users = self._waiting.get(ticket.queue, OrderedDict())
        tickets = users.get(ticket.user, deque())
        if ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del users[ticket.user]
            if not users:
                del self._waiting[ticket.queue]
            self._metrics.queue_depth(self._model, self.waiting)

    def _dispatch(self) -> None:
        info = self.engine.info
        while info is not None and self.engine.state == "ready":
            heads = (next(iter(users.values()))[0] for users in self._waiting.values())
            first = next((ticket for ticket in heads if self._has_room(ticket, info)), None)
            if first is None:
                break
            self._send(self._batch_of(first, 1 if _streams(info) else info.max_batch))
        self._metrics.queue_depth(self._model, self.waiting)

    def _has_room(self, ticket: Ticket, info: ModelInfo) -> bool:
        """Whether the engine takes a ticket now: if it streams, one picture and some chats at the same time."""
        if not _streams(info):
            return not self._running
        alike = sum(running.draws == ticket.draws for running in self._running.values())
        return alike < (1 if ticket.draws else info.max_batch)

    def _batch_of(self, first: Ticket, most: int) -> list[Ticket]:
        """Take a ticket, and others that can run with it, in the order of turns."""
        batch = [first]
        key = first.request.batch_key()
        items = first.request.items
        if key is not None and not first.tries:  # one that was tried before may be what ended the engine
            for ticket in self._in_turn():
                if ticket is first or ticket.request.batch_key() != key:
                    continue
                if items + ticket.request.items > most or ticket.tries:
                    continue
                batch.append(ticket)
                items += ticket.request.items
        for ticket in batch:
            self._forget(ticket)
        if (users := self._waiting.get(first.queue)) is not None:
            self._waiting.move_to_end(first.queue)
            if first.user in users:
                users.move_to_end(first.user)
        return batch

    def _in_turn(self) -> list[Ticket]:
        return _in_turn([_in_turn(list(users.values())) for users in self._waiting.values()])

    def _send(self, batch: list[Ticket]) -> None:
        now = time.monotonic()
        for ticket in batch:
            ticket.tries += 1
            ticket.sent = now
            if ticket.wait_s is None:
                ticket.wait_s = now - ticket.submitted
                self._metrics.waited(self._model, ticket.wait_s)
                tracing.record("queue", ticket.place, ticket.submitted, now, model=self._model)
            self._running[ticket.request.id] = ticket
        self._metrics.batch(self._model, sum(ticket.request.items for ticket in batch))
        self.engine.mark_progress()
        self.engine.send(Run(tuple(ticket.request for ticket in batch)))

    def _on_event(self, event: Event) -> None:
        ticket = self._running.get(event.id)
        if ticket is None:
            return
        if isinstance(event, (Finished, Failed)):
            del self._running[event.id]
            self._end(ticket, event)
            self._dispatch()
            return
        if isinstance(event, Progress) and event.step > 1:  # the first holds the encoding of the prompt, too
            self._metrics.step(self._model, event.step_s)
        ticket.put(event)

    def _end(self, ticket: Ticket, event: Finished | Failed) -> None:
        if ticket.has_ended:
            return
        ticket.put(event)
        self._metrics.ended(self._model, event)
        if ticket.sent is not None:
            outcome = "ok" if isinstance(event, Finished) else event.kind
            tracing.record(
                "generate", ticket.place, ticket.sent, time.monotonic(),
                model=self._model, outcome=outcome, tries=ticket.tries,
            )  # fmt: skip
        if isinstance(event, Finished):
            self._recent_s.append(event.seconds)
            if isinstance(event.result, Answer):
                self._metrics.tokens(self._model, event.result.usage)

    def _on_down(self, reason: str) -> None:
        """Queue again what ran, unless some of its answer is out or it was tried before."""
        self._metrics.engine_lost(self._model)
        lost, self._running = list(self._running.values()), {}
        for ticket in reversed(lost):
            if ticket.has_ended:
                continue
            if ticket.tries < self._max_tries and not ticket.has_output:
                ticket.pieces.clear()
                self._queue_of(ticket).appendleft(ticket)
                self._waiting[ticket.queue].move_to_end(ticket.user, last=False)
                self._waiting.move_to_end(ticket.queue, last=False)
                log.warning("request will run again", extra={"request_id": ticket.request.id})
            else:
                self._end(ticket, Failed(ticket.request.id, "engine_down", f"the engine was lost: {reason}"))
        if self.engine.state == "failed":  # no other engine will come
            self._stop_all("engine_down", reason)

    def close(self, reason: str) -> None:
        """End every ticket, because the server stops, and take no more."""
        self._closed = reason
        self._stop_all("stopped", reason)

    def _stop_all(self, kind: FailureKind, message: str) -> None:
        for ticket in [*self._running.values(), *self._in_turn()]:
            if not ticket.has_ended:
                self._stop(ticket, kind, message)

    def _retry_after_s(self) -> int:
        typical = sorted(self._recent_s)[len(self._recent_s) // 2] if self._recent_s else 1.0
        return max(1, min(round(typical * self._max_queue / 2), 60))


def _streams(info: ModelInfo) -> bool:
    """Whether a model takes requests while others run."""
    return bool(info.kinds & {"chat", "speech"})


def _in_turn(queues: Sequence[Sequence[Ticket]]) -> list[Ticket]:
    """Return the first of each queue, then the second of each, and so on."""
    longest = max(map(len, queues), default=0)
    return [tickets[place] for place in range(longest) for tickets in queues if place < len(tickets)]
