"""The same app on a Ray cluster: replicas on one or many nodes, as many as the load asks for.

Each replica is the whole app with its own engines, so a replica is what one group of ranks needs: all its
accelerators on one node. Ray's proxies spread requests over replicas and hold the queue; the replica's own queue
stays short.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from quantkit_runtime.errors import MissingDependencyError
from quantkit_runtime.server.app import create_app
from quantkit_runtime.server.checks import check_defaults
from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.logs import set_up_logging
from quantkit_runtime.server.settings import Cluster, Settings, SettingsError

log = logging.getLogger(__name__)

NAME = "quantkit"


class Replica:
    """One copy of the app, in an actor of its own.

    Args:
        settings: What to serve.
    """

    def __init__(self, settings: Settings) -> None:
        set_up_logging(settings.log_format, process="replica")
        # What is kept here is this replica's, and goes with it.
        self._folder = tempfile.TemporaryDirectory(prefix="quantkit-replica-")
        self._app = create_app(dataclasses.replace(settings, cluster=None, state_dir=Path(self._folder.name)))
        # Innermost, so that a key is asked for first, and the answer has an id and is logged.
        self._app.user_middleware.append(Middleware(NoJobs))
        self._app.router.lifespan_context = self._until_ready(self._app.router.lifespan_context)
        paths = self._app.openapi()["paths"]
        for path in [path for path in paths if _is_of_jobs(path)]:
            del paths[path]

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Ray asks for it under this name."""
        return self._app

    def _until_ready(self, lifespan: Any) -> Any:
        """Return a lifespan that has begun once the models are loaded, so that Ray sends nothing before."""

        @contextlib.asynccontextmanager
        async def waiting(app: Any) -> AsyncIterator[Any]:
            async with lifespan(app) as state:
                started = self._app.state.context.started
                assert started is not None
                await asyncio.shield(started)
                yield state

        return waiting

    def check_health(self) -> None:
        """Raise if an engine never came up; Ray then starts the replica anew, perhaps on another node."""
        for deployment in self._app.state.context.deployments.by_name.values():
            if deployment.engine.state == "failed":
                raise RuntimeError(f"model {deployment.name}: {deployment.engine.reason}")


class NoJobs:
    """Refuses video jobs: the replica that is asked for one need not be the one that has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and _is_of_jobs(scope["path"]):
            error = ApiError(
                501, "video jobs are kept by one server; a cluster draws videos by /v1/videos/sync", code="no_jobs"
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_of_jobs(path: str) -> bool:
    return path == "/v1/videos" or (path.startswith("/v1/videos/") and path != "/v1/videos/sync")


def serve_on_cluster(settings: Settings) -> None:
    """Serve on a Ray cluster until SIGTERM or SIGINT.

    Raises:
        MissingDependencyError: Ray is not installed.
        SettingsError: A default is none that a request could give, the cluster cannot be reached, or a model cannot
            be loaded on it.
    """
    assert settings.cluster is not None
    check_defaults(settings)
    ray, serve = _import_ray()
    set_up_logging(settings.log_format)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine unasked
    try:
        ray.init(address=settings.cluster.address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise SettingsError(f"--ray-address {settings.cluster.address}: cannot be reached ({error})") from error
    try:
        # Now, because Ray's start puts its own in their place, which end the process where it is.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": settings.host,
                "port": settings.port,
                "request_timeout_s": settings.limits.request_timeout_s,
            },
        )
        try:
            serve.run(bind(settings), name=NAME, route_prefix="/", blocking=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"the replicas could not be started, or could not load a model ({reason}); the logs in Ray's "
                "session folder on their machines tell more"
            ) from error
        log.info("ready", extra={"url": f"http://{settings.host}:{settings.port}", "models": list(settings.models)})
        threading.Event().wait()
    except _Stopped:
        log.info("stopping")
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


class _Stopped(BaseException):
    """Raised by a signal, wherever the start or the wait is."""


def _stop(_number: int, _frame: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the end is not to be interrupted
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped


def bind(settings: Settings) -> Any:
    """Return the Ray Serve application of these settings."""
    _, serve = _import_ray()
    cluster = settings.cluster or Cluster()
    ranks = [spec.ranks for spec in settings.models.values()]
    is_accelerated = any(not spec.device.startswith("cpu") for spec in settings.models.values())
    bundle = {"CPU": float(cluster.cpus_per_replica)}
    if is_accelerated:
        bundle["GPU"] = float(sum(ranks))
    deployment = serve.deployment(serve.ingress()(Replica))
    return deployment.options(
        name=NAME,
        ray_actor_options={"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)},
        # All ranks of a group talk to each other at every step: one bundle is one node.
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=cluster.max_requests,
        max_queued_requests=settings.limits.max_queue,
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=2,
        health_check_timeout_s=30,
        **_scaling(cluster),
    ).bind(settings)


def _scaling(cluster: Cluster) -> dict[str, Any]:
    if cluster.max_replicas == cluster.min_replicas:
        return {"num_replicas": cluster.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": cluster.min_replicas,
            "max_replicas": cluster.max_replicas,
            "target_ongoing_requests": cluster.target_requests,  # waiting ones count, too
            "upscale_delay_s": cluster.upscale_delay_s,
            "downscale_delay_s": cluster.downscale_delay_s,
        }
    }


def _import_ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError(
            f"ray is needed for --engine ray ({error}): pip install 'quantkit-runtime[ray]'"
        ) from error
    return ray, serve
