"""The engine process: loads one model and runs what the HTTP process sends.

``supervisor`` starts ``python -m quantkit_runtime.server.engine FD`` and holds the other end of the pipe FD.
Where several ranks share a model, each is such a process and gets the same messages in the same order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from quantkit_runtime.errors import BackendUnavailableError, ParallelError, QuantkitRuntimeError
from quantkit_runtime.server.failures import classify, free_memory, is_broken, loaded_torch, reason_of
from quantkit_runtime.server.inbox import Inbox
from quantkit_runtime.server.logs import set_up_logging
from quantkit_runtime.server.models.base import BatchModel, Cancelled, RequestRefusedError, StreamingModel
from quantkit_runtime.server.protocol import (
    Cancel,
    Failed,
    FailureKind,
    Finished,
    ModelInfo,
    ModelSpec,
    Phase,
    Progress,
    Ready,
    Request,
    Run,
    StartFailed,
    Stop,
)
from quantkit_runtime.server.settings import SettingsError

log = logging.getLogger(__name__)

BROKEN = 3
"""Exit code of an engine that cannot go on and must be started anew."""


def main() -> None:
    """Run the engine of this process until it is told to stop or its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent drains, then says stop
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    spec: ModelSpec = connection.recv()
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(os.environ.get("QUANTKIT_LOG_FORMAT", "json"), process=f"engine-{rank}")
    inbox = Inbox(connection)
    is_up = False
    try:
        with ExitStack() as stack:
            model = _start(spec, inbox, stack)
            engine = Engine(model, inbox, ranks=spec.ranks)
            inbox.send(Ready(model.info))
            is_up = True
            engine.serve()
    except QuantkitRuntimeError as error:
        # A device may come back, and ranks fail when another one is gone.
        may_pass = is_up or isinstance(error, (BackendUnavailableError, ParallelError))
        inbox.send(StartFailed(str(error), is_mistake=not may_pass))
    except BaseException as error:
        log.error("engine failed", exc_info=error)
        inbox.send(StartFailed(reason_of(error), is_mistake=False))
        _exit(BROKEN)
    _exit(0)


def _start(spec: ModelSpec, inbox: Inbox, stack: ExitStack) -> BatchModel | StreamingModel:
    begin = time.perf_counter()
    if spec.ranks > 1:
        from quantkit_runtime.parallel.launch import joined

        stack.enter_context(joined(spec.device))
        inbox.agree_with(_control_group())
    module, _, function = spec.loader.partition(":")
    load = getattr(import_module(module), function)
    begin = _phase(inbox, "import", begin)
    model: BatchModel | StreamingModel = load(spec)
    _check_defaults(model.info, spec)
    model.set_defaults(spec.defaults)
    begin = _phase(inbox, "load", begin)
    if spec.warm_up:
        model.warm_up()
        _phase(inbox, "warm up", begin)
    return model


def _control_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo")  # on the CPU, whatever the device


def _check_defaults(info: ModelInfo, spec: ModelSpec) -> None:
    unknown = spec.defaults.keys() - info.parameters - info.defaults.keys()
    if unknown:
        known = ", ".join(sorted(info.parameters | info.defaults.keys()))
        raise SettingsError(f"--default {min(unknown)}: {info.description} takes no such field; it takes {known}")


def _phase(inbox: Inbox, name: str, begin: float) -> float:
    now = time.perf_counter()
    inbox.send(Phase(name, now - begin))
    return now


class Engine:
    """Runs requests on a loaded model.

    Args:
        model: What runs them.
        inbox: Where they come from.
        ranks: Number of processes that share the model.
    """

    def __init__(self, model: BatchModel | StreamingModel, inbox: Inbox, *, ranks: int) -> None:
        self.model = model
        self.inbox = inbox
        self._ranks = ranks
        self._waiting: list[Any] = []  # messages that came while a batch ran
        self._cancelled: set[str] = set()
        self._streaming: dict[str, Request] = {}

    def serve(self) -> None:
        """Run what comes until `Stop`."""
        if isinstance(self.model, BatchModel):
            self._serve_batches(self.model)
        else:
            self._serve_stream(self.model)

    def _serve_batches(self, model: BatchModel) -> None:
        while True:
            message = self._waiting.pop(0) if self._waiting else self.inbox.wait()
            if isinstance(message, Stop):
                return
            if isinstance(message, Run):
                self.inbox.active = len(message.requests)
                self._run(model, message.requests)
                self._cancelled.clear()
                self.inbox.active = 0

    def _run(self, model: BatchModel, requests: Sequence[Request]) -> None:
        begin = last = time.perf_counter()
        _reset_peak_memory()

        def on_step(step: int, steps: int) -> None:
            nonlocal last
            now = time.perf_counter()
            for request in requests:
                self.inbox.tell(Progress(request.id, step, steps, now - last))
            last = now
            self._receive()
            if all(request.id in self._cancelled for request in requests):
                raise Cancelled

        try:
            results = model.run(requests, on_step)
        except Cancelled:
            for request in requests:
                self._fail(request, "cancelled", "cancelled")
        except Exception as error:
            kind, message, param = classify(error)
            if kind != "refused" and (self._ranks > 1 or is_broken(error)):
                self._give_up(error, kind, message, requests)
            if kind == "out_of_memory":
                free_memory(error)
            if len(requests) > 1:  # only one of them may be at fault, or all together were too much
                for request in requests:
                    self._run(model, [request])
                return
            if kind == "internal":
                log.error("request failed", exc_info=error, extra={"request_id": requests[0].id})
            self._fail(requests[0], kind, message, param)
        else:
            seconds, peak = time.perf_counter() - begin, _peak_memory_bytes()
            for request, result in zip(requests, results, strict=True):
                self.inbox.tell(Finished(request.id, result, seconds, peak))

    def _serve_stream(self, model: StreamingModel) -> None:
        while True:
            messages = self._agreed()
            if not model.active:
                messages = messages or [self.inbox.wait()]
                _reset_peak_memory()  # so that the peak is one of what runs from now on
            for message in messages:
                if isinstance(message, Stop):
                    return
                if isinstance(message, Cancel):
                    if self._streaming.pop(message.id, None) is not None:
                        model.cancel(message.id)
                        self.inbox.tell(Failed(message.id, "cancelled", "cancelled"))
                else:
                    self._admit(model, message)
            if not messages:  # what was admitted is agreed on, so that all ranks make the same step
                self._step(model)
            self.inbox.active = model.active

    def _agreed(self) -> list[Any]:
        """Return the messages that are here; the process ends if the ranks have not done the same so far."""
        try:
            return self.inbox.drain()
        except (ParallelError, RuntimeError) as error:  # the latter where another rank is gone
            self._give_up(error, "internal", "", ())

    def _admit(self, model: StreamingModel, message: Run) -> None:
        for request in message.requests:
            try:
                model.admit(request)
            except RequestRefusedError as error:
                self._fail(request, "refused", str(error), error.param)
            except Exception as error:
                kind, text, param = classify(error)
                log.error("request failed", exc_info=error, extra={"request_id": request.id})
                if is_broken(error):  # what one rank alone cannot admit shows before the next step
                    self._give_up(error, kind, text, [request])
                self._fail(request, kind, text, param)
            else:
                self._streaming[request.id] = request

    def _step(self, model: StreamingModel) -> None:
        try:
            events = model.step()
        except Exception as error:
            kind, text, _ = classify(error)
            log.error("step failed", exc_info=error)
            requests = list(self._streaming.values())
            if self._ranks > 1 or is_broken(error):
                self._give_up(error, kind, text, requests)
            model.reset()
            free_memory(error)
            for request in requests:
                self._fail(request, kind, text)
            self._streaming.clear()
            return
        for event in events:
            if isinstance(event, Finished):
                event = dataclasses.replace(event, peak_memory_bytes=_peak_memory_bytes())  # noqa: PLW2901  (the model does not know it)
            self.inbox.tell(event)
            if isinstance(event, (Finished, Failed)):
                self._streaming.pop(event.id, None)

    def _receive(self) -> None:
        for message in self.inbox.drain():
            if isinstance(message, Cancel):
                self._cancelled.add(message.id)
            else:
                self._waiting.append(message)

    def _fail(self, request: Request, kind: FailureKind, message: str, param: str | None = None) -> None:
        self.inbox.tell(Failed(request.id, kind, message, param))

    def _give_up(self, error: Exception, kind: FailureKind, message: str, requests: Sequence[Request]) -> NoReturn:
        """End the process after an error that leaves the device, or the other ranks, in an unknown state."""
        log.error("engine gives up", exc_info=error)
        if isinstance(error, ParallelError):
            self.inbox.send(StartFailed(str(error), is_mistake=False))
        # The error of one rank may be but the echo of another one's end: then the requests run again.
        if self._ranks == 1 or kind == "out_of_memory":
            for request in requests:
                self.inbox.send(Failed(request.id, kind, message))
        _exit(BROKEN)


def _reset_peak_memory() -> None:
    if (torch := loaded_torch()) is not None and torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def _peak_memory_bytes() -> int:
    """Return the accelerator's peak since the reset, or the highest resident size of the process so far."""
    if (torch := loaded_torch()) is not None and torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait in a library must not keep the process


if __name__ == "__main__":
    main()
