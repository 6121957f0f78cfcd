"""The HTTP application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI

import quantkit_runtime
from quantkit_runtime.server.checks import check_defaults
from quantkit_runtime.server.deployment import Deployment, Deployments
from quantkit_runtime.server.errors import add_handlers
from quantkit_runtime.server.job_store import JobStore
from quantkit_runtime.server.jobs import Jobs
from quantkit_runtime.server.metrics import Metrics
from quantkit_runtime.server.middleware import Guard
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.routes import chat, images, page, service, speech, videos
from quantkit_runtime.server.routes.common import TO_ALL, Context, errors
from quantkit_runtime.server.scheduler import Scheduler
from quantkit_runtime.server.security import OPEN_PATHS
from quantkit_runtime.server.settings import Settings
from quantkit_runtime.server.supervisor import EngineGroup

EngineFactory = Callable[[ModelSpec], EngineGroup]


def create_app(settings: Settings, make_engine: EngineFactory | None = None) -> FastAPI:
    """Return the application; its engines start and stop with it.

    Args:
        settings: What to serve and how.
        make_engine: Makes the engine of a model; processes on this machine if left out.

    Raises:
        SettingsError: A default is none that a request could give.
    """
    check_defaults(settings)
    several = len(settings.models) > 1
    make = make_engine or (
        lambda spec: EngineGroup(spec, settings.patience, log_format=settings.log_format, shares_cores=several)
    )
    metrics = Metrics()
    deployments = Deployments(
        {name: _deploy(name, make(spec), metrics, settings) for name, spec in settings.models.items()}
    )
    context = Context(settings, deployments, metrics)
    app = FastAPI(
        title="quantkit",
        version=quantkit_runtime.__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(context),
    )
    app.state.context = context
    add_handlers(app)
    for part in (images, videos, chat, speech, service, page):
        app.include_router(part.router, responses=errors(*TO_ALL))
    app.add_middleware(Guard, settings=settings)
    app.openapi_schema = _describe(app, settings)
    return app


def _describe(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document as this app really answers: with its models, limits and keys."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; mistakes are 400 here
            if path in OPEN_PATHS:
                operation["security"] = []
            if path in OPEN_PATHS or not settings.api_keys:
                del operation["responses"]["401"]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    bounds = _bounds(settings)
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:  # of a request
            for name in bounds.keys() & schema["properties"].keys():
                field = schema["properties"][name]
                field.get("anyOf", [field])[0].update(bounds[name])  # the second is null or empty
    if settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _bounds(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return what the options of this server allow in the fields of requests, as JSON Schema says it."""
    limits = settings.limits
    chars = {"maxLength": limits.max_prompt_chars}
    tokens = {"maximum": limits.max_tokens}
    return {
        "model": {"enum": list(settings.models)},
        "prompt": chars,
        "negative_prompt": chars,
        "input": chars,
        "num_inference_steps": {"maximum": limits.max_steps},
        "num_frames": {"maximum": limits.max_frames},
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
    }


def _deploy(name: str, engine: EngineGroup, metrics: Metrics, settings: Settings) -> Deployment:
    limits = settings.limits
    scheduler = Scheduler(engine, metrics, model=name, max_queue=limits.max_queue)
    return Deployment(name, engine, scheduler)


def _lifespan(context: Context) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        deployments = context.deployments.by_name.values()
        for deployment in deployments:
            deployment.engine.start()
        context.started = asyncio.create_task(_start(context))
        try:
            yield
        finally:
            context.started.cancel()
            await asyncio.gather(context.started, return_exceptions=True)
            await end_requests(context, "the server stops")
            if context.running_jobs is not None:
                await context.running_jobs.close()
            await asyncio.gather(*(deployment.engine.stop() for deployment in deployments))

    return lifespan


async def end_requests(context: Context, reason: str) -> None:
    """Answer all requests that wait or run with an error; video jobs are kept for the next start."""
    if context.running_jobs is not None:
        await context.running_jobs.stop()
    for deployment in context.deployments.by_name.values():
        deployment.scheduler.close(reason)


async def _start(context: Context) -> None:
    """Wait for the models, and take up the video jobs of the last run."""
    deployments = context.deployments.by_name.values()
    for deployment in deployments:
        await deployment.engine.wait_ready()
    draws_videos = [deployment for deployment in deployments if "video" in deployment.info.kinds]
    if draws_videos:
        limits = context.settings.limits
        store = await asyncio.to_thread(JobStore, context.settings.jobs_folder(), limits.job_ttl_s)
        context.running_jobs = Jobs(store, draws_videos, limits)
        await context.running_jobs.warn_of_others()
