"""``/v1/images``."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import StreamingResponse

from quantkit_runtime.server.checks import image_request
from quantkit_runtime.server.errors import ApiError, bad_request
from quantkit_runtime.server.media import decode_image, encode_image
from quantkit_runtime.server.protocol import Finished, Frames, ImageRequest, Progress
from quantkit_runtime.server.routes.common import (
    OF_RUNS,
    Events,
    ask,
    client_of,
    context_of,
    cost_headers,
    errors,
    first_of,
    new_id,
    sse,
    unless_gone,
)
from quantkit_runtime.server.schemas import ImageEditForm, ImageOptions, ImageRequestBody, ImagesResponse

if TYPE_CHECKING:
    import numpy as np

    from quantkit_runtime.server.deployment import Deployment

router = APIRouter(prefix="/v1/images", tags=["images"], responses=errors(*OF_RUNS))


@router.post(
    "/generations",
    response_model=ImagesResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The pictures; with stream, events"}},
)
async def generate(body: ImageRequestBody, request: Request) -> Any:
    """Draw pictures from a prompt."""
    context = context_of(request)
    deployment = context.deployments.find(body.model, "image", "draw pictures")
    if deployment.info.needs_image:
        raise bad_request(
            f"model: {deployment.name} edits pictures; use /v1/images/edits", "model", "unsupported_model"
        )
    asked = image_request(body, deployment, context.settings.limits, new_id(request))
    if body.stream:
        events = await unless_gone(request, first_of(ask(request, deployment, asked, body.user)))
        return StreamingResponse(_pieces(events, body, asked), media_type="text/event-stream")
    return await unless_gone(request, _draw(request, body, asked, deployment))


@router.post("/edits", response_model=ImagesResponse)
async def edit(body: Annotated[ImageEditForm, Form(media_type="multipart/form-data")], request: Request) -> Any:
    """Draw pictures from a prompt and a picture."""
    context = context_of(request)
    limits = context.settings.limits
    deployment = context.deployments.find(body.model, "image", "draw pictures")
    if not deployment.info.draws_from_image:
        raise bad_request(
            f"model: {deployment.name} ({deployment.info.description}) takes no picture, so it cannot edit",
            "model", "unsupported_model",
        )  # fmt: skip
    data = await body.image.read(limits.max_upload_bytes + 1)
    image = await asyncio.to_thread(decode_image, data, limits, "image")
    asked = image_request(body, deployment, limits, new_id(request), image)
    return await unless_gone(request, _draw(request, body, asked, deployment))


async def _draw(request: Request, body: ImageOptions, asked: ImageRequest, deployment: Deployment) -> Response:
    timeout_s = context_of(request).settings.limits.request_timeout_s
    finished, ticket = await deployment.scheduler.run(
        asked, client_of(request), user=body.user or "", timeout_s=timeout_s
    )
    headers = cost_headers(deployment, finished, ticket)
    return Response(await _answer(body, asked, finished), headers=headers, media_type="application/json")


async def _pieces(events: Events, body: ImageOptions, asked: ImageRequest) -> AsyncIterator[str]:
    """Yield progress and, at the end, each picture or an error; ending it early cancels the request."""
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    kind = "image_generation.progress"
                    yield sse(kind, {"type": kind, "step": event.step, "steps": event.steps})
                elif isinstance(event, Finished):
                    kind = "image_generation.completed"
                    rest = f'"type":"{kind}","created_at":{int(time.time())},{_rest(body, event).decode()}'
                    for item in await _items(body, asked, event):
                        yield sse(kind, f"{item.decode()[:-1]},{rest}")
    except ApiError as error:
        yield sse("error", error.body())


async def _answer(body: ImageOptions, asked: ImageRequest, finished: Finished) -> bytes:
    """Return the JSON of the pictures; put together here, because json would look through megabytes for escapes."""
    items = await _items(body, asked, finished)
    return b'{"data":[%b],"created":%d,%b' % (b",".join(items), time.time(), _rest(body, finished))


async def _items(body: ImageOptions, asked: ImageRequest, finished: Finished) -> list[bytes]:
    assert isinstance(finished.result, Frames)
    quality = 90 if body.output_compression is None else body.output_compression

    def item(pixels: np.ndarray, seed: int) -> bytes:
        picture = base64.b64encode(encode_image(pixels, body.output_format, quality))
        return b'{"b64_json":"%b","seed":%d}' % (picture, seed)

    pairs = zip(finished.result.pixels, asked.seeds, strict=True)
    return await asyncio.gather(*(asyncio.to_thread(item, *pair) for pair in pairs))


def _rest(body: ImageOptions, finished: Finished) -> bytes:
    """Return what all pictures have in common, up to the end of the object."""
    assert isinstance(finished.result, Frames)
    _, height, width, _ = finished.result.pixels.shape
    return json.dumps({"output_format": body.output_format, "size": f"{width}x{height}"}).encode()[1:]
