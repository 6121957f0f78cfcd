"""Starts the processes of an engine, watches them, and starts them anew when they crash or hang."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.protocol import (
    Delta,
    Finished,
    ModelInfo,
    ModelSpec,
    Phase,
    Ping,
    Pong,
    Progress,
    Ready,
    StartFailed,
    Stop,
)

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "down", "failed", "stopped"]
_MAX_BACKOFF_S = 30.0
_STOP_S = 10.0


class EngineStartError(QuantkitRuntimeError):
    """The engine could not be started at all; the message is its own."""


@dataclass(frozen=True)
class Patience:
    """How long silence may last.

    Attributes:
        ping_s: Between two pings.
        silence_s: Without an answer to pings, before the processes are killed. While a model loads only ``start_s``
            counts: imports of large libraries may hold up every thread.
        stall_s: Without any progress of a running request, before ``/ready`` tells so.
        step_s: Without any progress of a running request, before the processes are killed.
        start_s: From the start of the processes until the model is ready.
    """

    ping_s: float = 1.0
    silence_s: float = 20.0
    stall_s: float = 120.0
    step_s: float = 600.0
    start_s: float = 3600.0


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    connection: Connection
    outbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    unanswered: int = 0


class EngineGroup:
    """The processes that share one model.

    All methods are called in the event loop. Reading and writing happen in threads, because a stopped process would
    otherwise stop the loop, too.

    Args:
        spec: What to load.
        patience: When they count as hung.
        log_format: Of their logs.
        shares_cores: Whether engines of other models run on this machine, too.

    Attributes:
        state: ``starting``, ``ready``, ``down`` (to be started again), ``failed`` (never came up, or cannot again),
            ``stopped``.
        info: What the model can do; known from the first ready state on.
        reason: Why it is not ready, for people.
        phases: Seconds of each part of the last start.
        restarts: Times it was started again.
        on_event: Called with every event of a request.
        on_ready: Called when requests can be sent.
        on_down: Called with the reason when all that was sent is lost.
    """

    def __init__(
        self,
        spec: ModelSpec,
        patience: Patience | None = None,
        *,
        log_format: str = "json",
        shares_cores: bool = False,
    ) -> None:
        self.spec = spec
        self.patience = patience or Patience()
        self.state: State = "starting"
        self.reason = "loading"
        self.info: ModelInfo | None = None
        self.phases: dict[str, float] = {}
        self.restarts = 0
        self.on_event: Callable[[Any], None] = lambda _event: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_down: Callable[[str], None] = lambda _reason: None
        self._environment = os.environ | {"QUANTKIT_LOG_FORMAT": log_format}
        if shares_cores and spec.device.partition(":")[0] == "cpu":
            # OpenMP's threads wait for work by spinning, which takes the cores from the other engines' threads.
            self._environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._ranks: list[_Rank] = []
        self._generation = 0
        self._failures = 0
        self._ready_ranks = 0
        self._last_progress = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._came_up: asyncio.Future[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the model takes requests: it is idle and answers, or has moved on lately."""
        if self.state != "ready" or (
            self._busy() and time.monotonic() - self._last_progress > self.patience.stall_s
        ):
            return False
        patience_s = max(self.patience.silence_s / 4, 2 * self.patience.ping_s)
        return all(rank.unanswered * self.patience.ping_s < patience_s for rank in self._ranks)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [rank.process.pid for rank in self._ranks]

    def start(self) -> None:
        """Start the processes, and keep them running until `stop`."""
        self._came_up = asyncio.get_running_loop().create_future()
        self._spawn_soon(0.0)
        self._keep(self._watch())

    async def wait_ready(self) -> None:
        """Wait until the model is ready for the first time.

        Raises:
            EngineStartError: It cannot be loaded.
        """
        assert self._came_up is not None
        await asyncio.shield(self._came_up)

    def send(self, message: Any) -> None:
        """Send a message to every rank."""
        if isinstance(message, Ping):
            for rank in self._ranks:
                rank.unanswered += 1
        for rank in self._ranks:
            rank.outbox.put(message)

    def mark_progress(self) -> None:
        """Begin to wait for progress anew; called when a request is sent."""
        self._last_progress = time.monotonic()

    async def stop(self) -> None:
        """End the processes; those that do not end by themselves are killed."""
        if self.state == "stopped":
            return
        self.state, self.reason = "stopped", "stopped"
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ranks, self._ranks = self._ranks, []
        self._generation += 1
        for rank in ranks:
            rank.outbox.put(Stop())
        await asyncio.gather(*(asyncio.to_thread(_end, rank, _STOP_S) for rank in ranks))

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn_soon(self, delay_s: float) -> None:
        self._keep(self._spawn(delay_s))

    async def _spawn(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._generation += 1
        self.state = "starting"
        self._ready_ranks = 0
        self.phases = {}
        self.mark_progress()
        try:
            self._ranks = await asyncio.to_thread(_start_ranks, self.spec, self._environment)
        except OSError as error:
            self._lose(f"cannot be started: {error}")
            return
        loop = asyncio.get_running_loop()
        for number, rank in enumerate(self._ranks):
            arguments = (loop, self._generation, number, rank)
            threading.Thread(target=self._read, args=arguments, name=f"from-rank-{number}", daemon=True).start()
            threading.Thread(target=_write, args=(rank,), name=f"to-rank-{number}", daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop, generation: int, number: int, rank: _Rank) -> None:
        message: Any = None
        while True:
            try:
                message = rank.connection.recv()
            except (EOFError, OSError):
                message = None
            try:
                loop.call_soon_threadsafe(self._on_message, generation, number, message)
            except RuntimeError:  # the loop is closed
                return
            if message is None:
                rank.connection.close()
                return

    def _on_message(self, generation: int, number: int, message: Any) -> None:
        if generation != self._generation:
            return
        if message is None:
            self._lose(None)
        elif isinstance(message, Pong):
            self._ranks[number].unanswered = 0
        elif isinstance(message, Phase):
            if number == 0:
                self.phases[message.name] = message.seconds
                log.info("engine: %s took %.1f s", message.name, message.seconds)
        elif isinstance(message, Ready):
            self._on_rank_ready(number, message)
        elif isinstance(message, StartFailed):
            self._on_start_failed(message)
        else:
            if isinstance(message, (Progress, Delta, Finished)):
                self.mark_progress()
            if isinstance(message, Finished):
                self._failures = 0
            self.on_event(message)

    def _on_rank_ready(self, number: int, message: Ready) -> None:
        if number == 0:
            self.info = message.info
        self._ready_ranks += 1
        if self._ready_ranks < len(self._ranks):
            return
        for rank in self._ranks:
            rank.unanswered = 0
        self.state, self.reason = "ready", ""
        assert self.info is not None
        log.info("engine ready", extra={"model": self.info.description, "pids": self.pids})
        if self._came_up is not None and not self._came_up.done():
            self._came_up.set_result(None)
        self.on_ready()

    def _on_start_failed(self, message: StartFailed) -> None:
        self._lose(message.message, is_mistake=message.is_mistake)

    async def _watch(self) -> None:
        patience = self.patience
        while True:
            await asyncio.sleep(patience.ping_s)
            silent_s = time.monotonic() - self._last_progress
            if self.state == "starting" and self._ranks and silent_s > patience.start_s:
                self._lose(f"not ready after {patience.start_s:g} s")
            elif self.state == "ready":
                unanswered = max((rank.unanswered for rank in self._ranks), default=0)
                if unanswered * patience.ping_s >= patience.silence_s:
                    self._lose(f"no sign of life for {patience.silence_s:g} s")
                elif self._busy() and silent_s > patience.step_s:
                    self._lose(f"no progress for {patience.step_s:g} s")
                else:
                    self.send(Ping())

    _busy: Callable[[], bool] = staticmethod(lambda: False)

    def watch_progress_while(self, busy: Callable[[], bool]) -> None:
        """Tell when a running request must make progress."""
        self._busy = busy

    def _lose(self, reason: str | None, *, is_mistake: bool = False) -> None:
        """Give up these processes: kill what is left of them, and start new ones unless that cannot help."""
        self._generation += 1
        ranks, self._ranks = self._ranks, []
        was_up = self._came_up is None or self._came_up.done()
        self.state = "down"
        self._keep(self._after_loss(ranks, reason, was_up=was_up, is_mistake=is_mistake))

    async def _after_loss(self, ranks: list[_Rank], reason: str | None, *, was_up: bool, is_mistake: bool) -> None:
        codes = await asyncio.gather(*(asyncio.to_thread(_end, rank, 0.0) for rank in ranks))
        if reason is None:
            reason = _exit_reason([code for code in codes if code is not None])
        self.reason = f"the engine is being restarted: {reason}"
        log.error("engine lost", extra={"reason": reason})
        is_final = is_mistake or not was_up
        if is_final:
            self.state, self.reason = "failed", reason
        if not was_up:
            assert self._came_up is not None
            self._came_up.set_exception(EngineStartError(reason))
        self.on_down(reason)
        if is_final:
            return
        self.restarts += 1
        self._failures += 1
        self._spawn_soon(0.0 if self._failures == 1 else min(0.5 * 2**self._failures, _MAX_BACKOFF_S))


def _start_ranks(spec: ModelSpec, environment: dict[str, str]) -> list[_Rank]:
    if spec.ranks > 1:
        group = {
            "WORLD_SIZE": str(spec.ranks),
            "LOCAL_WORLD_SIZE": str(spec.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        return [
            _start_rank(spec, environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(spec.ranks)
        ]
    return [_start_rank(spec, environment)]


def _start_rank(spec: ModelSpec, environment: dict[str, str]) -> _Rank:
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantkit_runtime.server.engine", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    rank = _Rank(process, ours)
    rank.outbox.put(spec)
    return rank


def _write(rank: _Rank) -> None:
    while (message := rank.outbox.get()) is not None:
        try:
            rank.connection.send(message)
        except OSError:  # the reader notices, too
            return


def _end(rank: _Rank, patience_s: float) -> int | None:
    """Wait for a process, kill it after this time, and return how it ended; None if it had to be killed."""
    code: int | None
    try:
        code = rank.process.wait(patience_s or 0.2)
    except subprocess.TimeoutExpired:
        code = None
        rank.process.kill()
        rank.process.wait()
    rank.outbox.put(None)
    return code


def _exit_reason(codes: list[int]) -> str:
    for code in sorted(codes):  # of several ranks the one that was killed; the others end for want of it
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code > 0:
            return f"ended with exit code {code}"
    return "ended"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
