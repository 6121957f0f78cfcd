"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from quantkit_runtime.server.chat_schemas import (
    AssistantMessage,
    AudioAnswer,
    ChatBody,
    ChatCompletion,
    Choice,
    UsageBody,
    chunk,
)
from quantkit_runtime.server.conversation import chat_request, names_urls
from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.media import encode_sound
from quantkit_runtime.server.protocol import Answer, Delta, Finished, Usage
from quantkit_runtime.server.routes.common import (
    OF_RUNS,
    Events,
    ask,
    context_of,
    errors,
    first_of,
    model_header,
    new_id,
    sse,
    unless_gone,
)

if TYPE_CHECKING:
    from quantkit_runtime.server.deployment import Deployment

_FETCHING = ThreadPoolExecutor(16, "fetch")  # apart, so that slow hosts keep nothing waiting that has come whole

router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=errors(*OF_RUNS))


@router.post(
    "/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The answer, or its pieces with stream"}},
)
async def complete(body: ChatBody, request: Request) -> Any:
    """Answer a conversation with text, sound or both."""
    arrived = time.monotonic()
    context = context_of(request)
    deployment = context.deployments.find(body.model, "chat", "chat")
    threads = _FETCHING if context.settings.allow_remote_media and names_urls(body) else None
    read = partial(chat_request, body, deployment, context.settings, new_id(request), arrived)
    asked = await asyncio.get_running_loop().run_in_executor(threads, read)
    events = ask(request, deployment, asked, body.user, streams=body.stream, arrived=arrived)
    if not body.stream:
        return await unless_gone(request, _whole(events, body, deployment))
    started = await unless_gone(request, first_of(events))  # what is refused still gets its own status
    return StreamingResponse(_pieces(started, body, deployment), media_type="text/event-stream")


async def _whole(events: Events, body: ChatBody, deployment: Deployment) -> JSONResponse:
    text: list[str] = []
    sound: list[np.ndarray] = []
    rate = 0
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                text.append(event.text)
                if event.samples is not None:
                    sound.append(event.samples)
                    rate = event.rate
            elif isinstance(event, Finished):
                return await _completion(event, "".join(text), sound, rate, body, deployment)
    raise AssertionError("events end with Finished or an exception")


async def _completion(
    finished: Finished, text: str, sound: list[np.ndarray], rate: int, body: ChatBody, deployment: Deployment
) -> JSONResponse:
    assert isinstance(finished.result, Answer)
    message = AssistantMessage(content=text)
    if sound:
        form = body.audio.format if body.audio is not None else "wav"
        data = await asyncio.to_thread(encode_sound, np.concatenate(sound), rate, form)
        message.content = None
        message.audio = AudioAnswer(
            id=f"audio-{uuid.uuid4().hex}",
            data=base64.b64encode(data).decode(),
            expires_at=int(time.time()),  # nothing is kept to refer to
            transcript=text,
        )
    completion = ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=deployment.name,
        choices=[Choice(message=message, finish_reason=finished.result.finish_reason)],
        usage=_usage(finished.result.usage),
    )
    headers = model_header(deployment.name) | {"X-Inference-Time-S": f"{finished.seconds:.3f}"}
    return JSONResponse(completion.model_dump(exclude_none=False), headers=headers)


async def _pieces(events: Events, body: ChatBody, deployment: Deployment) -> AsyncIterator[str]:
    """Yield the answer as server-sent events; ending it early cancels the request."""
    identity, created, name = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), deployment.name
    audio_id = f"audio-{uuid.uuid4().hex}"
    tells_usage = body.stream_options is not None and body.stream_options.include_usage
    none_yet: dict[str, Any] = {"usage": None} if tells_usage else {}

    def piece(delta: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        return chunk(identity, created, name, delta, finish) | none_yet

    yield sse(None, piece({"role": "assistant", "content": ""}))
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    for delta in _deltas(event, audio_id):
                        yield sse(None, piece(delta))
                elif isinstance(event, Finished):
                    assert isinstance(event.result, Answer)
                    yield sse(None, piece({}, event.result.finish_reason))
                    if tells_usage:
                        yield sse(None, piece(None) | {"usage": _usage(event.result.usage).model_dump()})
    except ApiError as error:
        yield sse(None, error.body())
    yield sse(None, "[DONE]")


def _deltas(event: Delta, audio_id: str) -> list[dict[str, Any]]:
    """Return a piece as OpenAI streams it: text, and sound as 16-bit samples."""
    deltas: list[dict[str, Any]] = []
    if event.text:
        deltas.append({"content": event.text})
    if event.samples is not None:
        data = base64.b64encode(encode_sound(event.samples, event.rate, "pcm16")).decode()
        deltas.append({"audio": {"id": audio_id, "data": data}})
    return deltas


def _usage(usage: Usage) -> UsageBody:
    total = usage.prompt_tokens + usage.completion_tokens
    return UsageBody(
        prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=total
    )
