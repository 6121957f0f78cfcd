"""What is served and how it is: models, health, metrics, version."""

from __future__ import annotations

import time
from importlib.metadata import version as version_of

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import quantkit_runtime
from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.routes.common import context_of, errors
from quantkit_runtime.server.schemas import Health, ModelCard, ModelList, Version

router = APIRouter(tags=["service"])
_STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> ModelList:
    """List the models."""
    names = context_of(request).deployments.by_name
    return ModelList(data=[ModelCard(id=name, created=_STARTED) for name in names])


@router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404))
async def model(name: str, request: Request) -> ModelCard:
    """Tell of one model."""
    if name not in context_of(request).deployments.by_name:
        raise ApiError(404, f"model: {name!r} is not served", param="model", code="model_not_found")
    return ModelCard(id=name, created=_STARTED)


@router.get("/health", response_model=Health)
async def health() -> Health:
    """Answer as long as the HTTP process lives."""
    return Health(status="ok")


@router.get("/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(request: Request) -> Response:
    """Answer 200 only while every engine is loaded and answers, or has lately."""
    context = context_of(request)
    deployments = context.deployments.by_name
    states = {
        name: "ready" if d.engine.is_ready else d.engine.reason or "no answer" for name, d in deployments.items()
    }
    has_started = context.started is not None and context.started.done()
    is_ready = has_started and all(deployment.engine.is_ready for deployment in deployments.values())
    body = Health(status="ready" if is_ready else "not_ready", models=states)
    return JSONResponse(body.model_dump(), 200 if is_ready else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Counters in Prometheus's text format"}},
)
async def metrics(request: Request) -> Response:
    """Answer what Prometheus scrapes."""
    context = context_of(request)
    for name, deployment in context.deployments.by_name.items():
        context.metrics.engine_ready(name, deployment.engine.is_ready)
    text, content_type = context.metrics.expose()
    return Response(text, headers={"Content-Type": content_type})


@router.get("/version", response_model=Version)
async def version() -> Version:
    """Answer versions."""
    return Version(version=quantkit_runtime.__version__, torch=version_of("torch"))
