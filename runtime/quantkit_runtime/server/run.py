"""Runs a server in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time

import uvicorn

from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.app import create_app
from quantkit_runtime.server.logs import set_up_logging
from quantkit_runtime.server.routes.common import Context
from quantkit_runtime.server.settings import Settings, SettingsError
from quantkit_runtime.server.tracing import exporting

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs.

    Raises:
        SettingsError: The address cannot be bound.
        EngineStartError: A model cannot be loaded.
        MissingDependencyError: The environment asks for traces, which need another extra.
    """
    if settings.cluster is not None:
        from quantkit_runtime.server.cluster import serve_on_cluster

        serve_on_cluster(settings)
        return
    set_up_logging(settings.log_format)
    # uvicorn ends by raising the signal again that it was stopped by; having drained is no failure.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    with exporting(), bind(settings) as bound:
        asyncio.run(_serve(settings, bound))


async def _serve(settings: Settings, bound: socket.socket) -> None:
    begin = time.perf_counter()
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s),
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    starting = asyncio.create_task(_wait_started(app.state.context, server))
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening", extra={"url": url, "models": list(settings.models)})
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not serving.done():
            starting.result()
            log.info("ready", extra={"url": url, "seconds": round(time.perf_counter() - begin, 1)})
            await serving
    except QuantkitRuntimeError:
        server.should_exit = True
        await serving
        raise
    finally:
        starting.cancel()


async def _wait_started(context: Context, server: uvicorn.Server) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    assert context.started is not None
    await asyncio.shield(context.started)


def bind(settings: Settings) -> socket.socket:
    """Return a socket bound to the address of these settings.

    Raises:
        SettingsError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, or asyncio would leave Nagle's algorithm on: 40 ms for each answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        bound.close()
        raise SettingsError(
            f"--port {settings.port}: cannot be bound on {settings.host} ({error.strerror})"
        ) from error
    bound.set_inheritable(False)
    return bound
