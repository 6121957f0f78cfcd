"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

import quantkit_runtime
from quantkit_runtime.server.deployment import Deployment, Deployments
from quantkit_runtime.server.errors import add_handlers
from quantkit_runtime.server.metrics import Metrics
from quantkit_runtime.server.middleware import Guard
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.routes import chat, images, service, speech
from quantkit_runtime.server.routes.common import Context
from quantkit_runtime.server.scheduler import Scheduler
from quantkit_runtime.server.settings import Settings
from quantkit_runtime.server.supervisor import EngineGroup

EngineFactory = Callable[[ModelSpec], EngineGroup]


def create_app(settings: Settings, make_engine: EngineFactory | None = None) -> FastAPI:
    """Return the application; its engines start and stop with it.

    Args:
        settings: What to serve and how.
        make_engine: Makes the engine of a model; processes on this machine if left out.
    """
    make = make_engine or (lambda spec: EngineGroup(spec, settings.patience, log_format=settings.log_format))
    metrics = Metrics()
    deployments = Deployments(
        {name: _deploy(name, make(spec), metrics, settings) for name, spec in settings.models.items()}
    )
    app = FastAPI(
        title="quantkit",
        version=quantkit_runtime.__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(deployments),
    )
    app.state.context = Context(settings, deployments, metrics)
    add_handlers(app)
    for part in (images, chat, speech, service):
        app.include_router(part.router)
    app.add_middleware(Guard, settings=settings)
    return app


def _deploy(name: str, engine: EngineGroup, metrics: Metrics, settings: Settings) -> Deployment:
    limits = settings.limits
    scheduler = Scheduler(engine, metrics, model=name, max_queue=limits.max_queue, max_batch=limits.max_batch)
    return Deployment(name, engine, scheduler)


def _lifespan(deployments: Deployments) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        for deployment in deployments.by_name.values():
            deployment.engine.start()
        try:
            yield
        finally:
            for deployment in deployments.by_name.values():
                await deployment.engine.stop()
                deployment.scheduler.fail_all("the server stops")

    return lifespan
