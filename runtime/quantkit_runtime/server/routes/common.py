"""What all endpoints need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

from fastapi import Request

from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.protocol import Delta, Finished, Progress
from quantkit_runtime.server.protocol import Request as Asked
from quantkit_runtime.server.schemas import ErrorBody

if TYPE_CHECKING:
    from quantkit_runtime.server.deployment import Deployment, Deployments
    from quantkit_runtime.server.jobs import Jobs
    from quantkit_runtime.server.metrics import Metrics
    from quantkit_runtime.server.scheduler import Ticket
    from quantkit_runtime.server.settings import Settings

T = TypeVar("T")
Events = AsyncGenerator[Progress | Delta | Finished]

_IN_HEADERS = "".join(map(chr, range(32, 127))).replace("%", "")
_MEANINGS = {
    400: "A field is wrong; param names it",
    401: "No API key, or a wrong one",
    403: "From a page of another site",
    404: "Unknown model or id",
    409: "The video is not completed, or the Idempotency-Key was used for another request",
    413: "Body or upload too large",
    415: "Wrong content type",
    429: "Too much waits, see Retry-After, or kept videos take too much",
    500: "The model failed",
    503: "The model is not ready, its engine was lost, or the server stops",
    504: "Not done in time",
    507: "Out of memory, or of disk for jobs",
}
TO_ALL = (401, 403)
"""Statuses that any request may get: the middleware looks who calls."""
OF_RUNS = (400, 404, 413, 415, 429, 500, 503, 504, 507)
"""Statuses of requests that a model runs while the caller waits."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what an operation may answer beside its success, for OpenAPI."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


@dataclass
class Context:
    """What the app holds.

    Attributes:
        settings: What it was started with.
        deployments: The models.
        metrics: Counters.
        running_jobs: Video jobs; None until a model that draws videos is loaded.
        started: Done when all models are loaded, with what stopped them from it.
    """

    settings: Settings
    deployments: Deployments
    metrics: Metrics
    running_jobs: Jobs | None = None
    started: asyncio.Task[None] | None = None

    @property
    def jobs(self) -> Jobs:
        """Video jobs.

        Raises:
            ApiError: The models are not loaded yet, or none draws videos.
        """
        if self.started is None or not self.started.done():
            raise ApiError(
                503, "the models are not ready: loading", code="model_not_ready", headers={"Retry-After": "5"}
            )
        if self.running_jobs is None:
            raise ApiError(404, "no model that draws videos is served", code="not_found")
        return self.running_jobs


def context_of(request: Request) -> Context:
    """Return what the app of a request holds."""
    return cast("Context", request.app.state.context)


def client_of(request: Request) -> str:
    """Return whose turn a request takes."""
    return str(request.state.client)


def owner_of(request: Request) -> str:
    """Return whose jobs a request may see: those of its key, or all where none is needed."""
    context = context_of(request)
    return client_of(request) if context.settings.api_keys else ""


def new_id(request: Request) -> str:
    """Return an id for the engine: unique, whatever the client sent, and found in the log by the request's own."""
    return f"{request.state.request_id}.{uuid.uuid4().hex[:8]}"


def ask(
    request: Request,
    deployment: Deployment,
    asked: Asked,
    user: str | None,
    *,
    streams: bool = False,
    arrived: float | None = None,
) -> Events:
    """Put a request into the queue of its model; closing its events cancels it.

    Args:
        request: What came.
        deployment: The model.
        asked: What it is to run.
        user: As the request names one.
        streams: Whether pieces of an answer are sent as they come.
        arrived: When, by ``time.monotonic``; None is now.

    Raises:
        ApiError: The queue does not take it.
    """
    timeout_s = context_of(request).settings.limits.request_timeout_s
    if arrived is not None:
        timeout_s = max(timeout_s - (time.monotonic() - arrived), 0)
    scheduler = deployment.scheduler
    ticket = scheduler.submit(asked, client_of(request), user=user or "", timeout_s=timeout_s, streams=streams)
    return scheduler.follow(ticket)


def model_header(name: str) -> dict[str, str]:
    """Return the header that tells the model; what no header can hold, as in a URL."""
    return {"X-Model": quote(name, safe=_IN_HEADERS)}


def cost_headers(deployment: Deployment, finished: Finished, ticket: Ticket) -> dict[str, str]:
    """Return headers that tell what made an answer, and what that took."""
    return {
        **model_header(deployment.name),
        "X-Inference-Time-S": f"{finished.seconds:.3f}",
        "X-Queue-Time-S": f"{ticket.wait_s or 0:.3f}",
        "X-Peak-Memory-MB": f"{finished.peak_memory_bytes / 2**20:.0f}",
    }


async def first_of(events: Events) -> Events:
    """Wait for the first event, and return the events with it; an error raised instead comes out here."""
    first = await anext(events)

    async def all_of() -> Events:
        yield first
        async with aclosing(events):
            async for event in events:
                yield event

    return all_of()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work returns, and cancel it when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client went away", code="cancelled")
    finally:
        for waiting in (task, gone):
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await waiting


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(event: str | None, data: Any) -> str:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"
