"""``/v1/audio/speech``."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import numpy as np
from fastapi import APIRouter, Request, Response

from quantkit_runtime.server.chat_schemas import SpeechBody
from quantkit_runtime.server.conversation import speech_request
from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.media import SOUND_TYPES, encode_sound
from quantkit_runtime.server.protocol import Answer, Delta, Finished
from quantkit_runtime.server.routes.common import (
    OF_RUNS,
    Events,
    ask,
    context_of,
    errors,
    model_header,
    new_id,
    unless_gone,
)

if TYPE_CHECKING:
    from quantkit_runtime.server.deployment import Deployment

router = APIRouter(prefix="/v1/audio", tags=["speech"], responses=errors(*OF_RUNS))


@router.post(
    "/speech",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in SOUND_TYPES.values()}, "description": "The sound"}},
)
async def speak(body: SpeechBody, request: Request) -> Response:
    """Read a text aloud."""
    context = context_of(request)
    deployment = context.deployments.find(body.model, "speech", "speak")
    asked = speech_request(body, deployment, context.settings, new_id(request))
    return await unless_gone(request, _sound(ask(request, deployment, asked, body.user), body, deployment))


async def _sound(events: Events, body: SpeechBody, deployment: Deployment) -> Response:
    pieces: list[np.ndarray] = []
    rate, seconds, reason = 0, 0.0, ""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta) and event.samples is not None:
                pieces.append(event.samples)
                rate = event.rate
            elif isinstance(event, Finished):
                assert isinstance(event.result, Answer)
                seconds, reason = event.seconds, event.result.finish_reason
    if not pieces:
        raise ApiError(500, "the model made no sound", code="internal_error")
    data = await asyncio.to_thread(encode_sound, np.concatenate(pieces), rate, body.response_format)
    headers = {
        **model_header(deployment.name),
        "X-Inference-Time-S": f"{seconds:.3f}",
        "X-Sample-Rate": str(rate),
        "X-Finish-Reason": reason,
    }
    return Response(data, media_type=SOUND_TYPES[body.response_format], headers=headers)
