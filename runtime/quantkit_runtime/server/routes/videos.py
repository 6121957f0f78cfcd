"""``/v1/videos``."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Form, Header, Query, Request, Response

from quantkit_runtime.server.checks import video_request
from quantkit_runtime.server.media import decode_image, encode_mp4
from quantkit_runtime.server.protocol import Frames, VideoRequest
from quantkit_runtime.server.routes.common import (
    OF_RUNS,
    client_of,
    context_of,
    cost_headers,
    errors,
    model_header,
    new_id,
    owner_of,
    unless_gone,
)
from quantkit_runtime.server.schemas import Video, VideoDeleted, VideoError, VideoForm, VideoList

if TYPE_CHECKING:
    from quantkit_runtime.server.deployment import Deployment
    from quantkit_runtime.server.job_store import Job
    from quantkit_runtime.server.jobs import Jobs

router = APIRouter(prefix="/v1/videos", tags=["videos"])
Body = Annotated[VideoForm, Form(media_type="multipart/form-data")]
_MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {}}, "description": "The video"}}


@router.post("/sync", response_class=Response, responses=_MP4 | errors(*OF_RUNS))
async def generate(body: Body, request: Request) -> Response:
    """Draw a video and answer with it."""
    deployment, asked, _ = await _read(body, request)
    return await unless_gone(request, _draw(request, body, asked, deployment))


@router.post("", response_model=Video, responses=errors(400, 404, 409, 413, 415, 429, 503, 507))
async def create(
    body: Body,
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="The same key makes the same job once")
    ] = None,
) -> Video:
    """Create a job that draws a video."""
    deployment, asked, upload = await _read(body, request)
    jobs = context_of(request).jobs
    given = body.model_dump(exclude={"input_reference"}) | {"upload": upload}
    body_hash = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    job = await jobs.create(
        owner_of(request), deployment.name, asked, body_hash=body_hash, idempotency_key=idempotency_key
    )
    return _video(job, jobs)


@router.get("", response_model=VideoList, responses=errors(400, 404, 503))
async def list_videos(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """List the jobs of the caller."""
    jobs = context_of(request).jobs
    found, has_more = await jobs.list_of(owner_of(request), limit, after, order)
    data = [_video(job, jobs) for job in found]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


@router.get("/{video_id}", response_model=Video, responses=errors(404, 503))
async def retrieve(video_id: str, request: Request) -> Video:
    """Tell where a job stands."""
    jobs = context_of(request).jobs
    return _video(await jobs.get(video_id, owner_of(request)), jobs)


@router.get("/{video_id}/content", response_class=Response, responses=_MP4 | errors(400, 404, 409, 503))
async def content(
    video_id: str, request: Request, variant: Annotated[Literal["video"], Query()] = "video"
) -> Response:
    """Answer with the video of a completed job."""
    del variant  # the only one
    jobs = context_of(request).jobs
    job = await jobs.get(video_id, owner_of(request))
    return Response(await jobs.content(job), media_type="video/mp4", headers=model_header(job.model))


@router.delete("/{video_id}", response_model=VideoDeleted, responses=errors(404, 503))
async def delete(video_id: str, request: Request) -> VideoDeleted:
    """Delete a job and its video; stop it if it runs."""
    await context_of(request).jobs.delete(video_id, owner_of(request))
    return VideoDeleted(id=video_id)


async def _read(body: VideoForm, request: Request) -> tuple[Deployment, VideoRequest, str | None]:
    """Return the model, the request and the digest of the upload."""
    context = context_of(request)
    limits = context.settings.limits
    deployment = context.deployments.find(body.model, "video", "draw videos")
    image = digest = None
    if body.input_reference is not None:
        data = await body.input_reference.read(limits.max_upload_bytes + 1)
        image = await asyncio.to_thread(decode_image, data, limits, "input_reference")
        digest = hashlib.sha256(data).hexdigest()
    return deployment, video_request(body, deployment, limits, new_id(request), image), digest


async def _draw(request: Request, body: VideoForm, asked: VideoRequest, deployment: Deployment) -> Response:
    timeout_s = context_of(request).settings.limits.request_timeout_s
    finished, ticket = await deployment.scheduler.run(
        asked, client_of(request), user=body.user or "", timeout_s=timeout_s
    )
    assert isinstance(finished.result, Frames)
    video = await asyncio.to_thread(encode_mp4, finished.result.pixels, asked.fps)
    headers = cost_headers(deployment, finished, ticket) | {
        "X-Num-Frames": str(len(finished.result.pixels)),
        "X-Seed": str(asked.seed),
    }
    return Response(video, media_type="video/mp4", headers=headers)


def _video(job: Job, jobs: Jobs) -> Video:
    asked = job.request
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=jobs.progress(job),
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if job.completed_at is not None else None,
        expires_at=int(job.expires_at) if job.expires_at is not None else None,
        prompt=asked["prompt"],
        size=f"{asked['width']}x{asked['height']}",
        seconds=f"{asked['num_frames'] / asked['fps']:g}",
        seed=asked["seed"],
        error=VideoError(code=job.error_code or "failed", message=job.error_message or "")
        if job.status == "failed"
        else None,
    )
