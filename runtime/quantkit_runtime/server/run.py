"""Runs a server in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import time

import uvicorn

from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.app import create_app, end_requests
from quantkit_runtime.server.logs import set_up_logging
from quantkit_runtime.server.routes.common import Context
from quantkit_runtime.server.settings import Settings, SettingsError
from quantkit_runtime.server.tracing import exporting

log = logging.getLogger(__name__)

_LAST_ANSWERS_S = 5.0  # for sending them, once the drain is over


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs.

    Raises:
        SettingsError: The address cannot be bound, or a default is none that a request could give.
        EngineStartError: A model cannot be loaded.
        MissingDependencyError: The environment asks for traces, which need another extra.
    """
    if settings.cluster is not None:
        from quantkit_runtime.server.cluster import serve_on_cluster

        serve_on_cluster(settings)
        return
    set_up_logging(settings.log_format)
    server = Server(settings)
    # Until uvicorn listens to signals, and when it has drained and raises the one again that it was stopped by.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: setattr(server, "should_exit", True))
    with exporting(), bind(settings) as bound:
        asyncio.run(_serve(server, settings, bound))


class Server(uvicorn.Server):
    """uvicorn's, which gives callers an answer before it cuts them off.

    Attributes:
        context: What the app holds.
    """

    def __init__(self, settings: Settings) -> None:
        app = create_app(settings)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.drain_s + _LAST_ANSWERS_S),
            )
        )
        self.context: Context = app.state.context
        self._drain_s = settings.drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no connections; end what still runs when the drain is over."""
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._drain_s)
        await end_requests(self.context, f"the server stops; what runs gets {self._drain_s:g} s to end")


async def _serve(server: Server, settings: Settings, bound: socket.socket) -> None:
    begin = time.perf_counter()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    starting = asyncio.create_task(_wait_started(server))
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening", extra={"url": url, "models": list(settings.models)})
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.cancelled():
            starting.result()
            log.info("ready", extra={"url": url, "seconds": round(time.perf_counter() - begin, 1)})
        await serving
    except QuantkitRuntimeError:
        server.should_exit = True
        await serving
        raise
    finally:
        starting.cancel()


async def _wait_started(server: Server) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    assert server.context.started is not None
    await asyncio.shield(server.context.started)


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
