"""Starting ranks on this machine, and what a rank needs to join its group."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from quantkit_runtime.errors import ParallelError

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another before it gives up."""

_log = logging.getLogger("quantkit_runtime")
_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def launched() -> bool:
    """Whether this process is a rank that ``torchrun`` or `launch` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Run a function in several new processes of this machine and wait for them.

    torch's elastic agent starts them, passes signals on and ends all when one fails.

    Args:
        function: Importable by name; called in every rank, in which `joined` works.
        arguments: Of the function; pickled.
        ranks: Number of processes.

    Raises:
        ParallelError: A rank failed or died. The message is the first failure's, the notes hold its traceback.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    received: int | None = None
    try:
        with _silent(*_LOGGERS):  # the error that is raised says the same in one line, its notes the rest
            elastic_launch(config, _run_recorded)(function, *arguments)
    except SignalException as error:
        received = error.sigval
    except ChildFailedError as error:
        # One that was killed comes first: the others then fail for want of it, maybe before the agent has seen why.
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
        found = ParallelError(f"rank {rank}: {_first_line(failure.message)}")
        found.add_note(_trace(failure.message))
        raise found from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # the agent has put its own in their place
        if received is not None:
            signal.raise_signal(received)  # the ranks have ended; now as if there had been no agent


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keep some loggers quiet for a while."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _run_recorded(function: Callable[..., None], *arguments: Any) -> None:
    """Run in a rank, leaving an exception where the agent reads it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal interrupts all ranks; the starter tells of it
    from torch.distributed.elastic.multiprocessing.errors import record

    record(function)(*arguments)


def _first_line(message: Any) -> str:
    """Return the reason out of what the agent knows of a failure: text, or what `record` left of an exception."""
    text = message["message"] if isinstance(message, dict) else message
    return str(text).splitlines()[0].removeprefix(f"{ParallelError.__name__}: ")


def _trace(message: Any) -> str:
    return str(message["extraInfo"]["py_callstack"]) if isinstance(message, dict) else str(message)


def device_of_rank(device: str) -> torch.device:
    """Return the device of this rank.

    Args:
        device: ``cpu``; a type of accelerator such as ``cuda``, of which each rank takes its own, or shares one
            where there are fewer; or one with its number, such as ``cuda:0``, which all ranks share.

    Raises:
        ParallelError: There is no accelerator of that number.
    """
    chosen, count = torch.device(device), torch.accelerator.device_count()
    if chosen.type == "cpu":
        return torch.device("cpu")
    if ":" not in device:
        return torch.device(chosen.type, int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1))
    if chosen.index >= count:
        raise ParallelError(f"device {device!r}: there are {count} accelerators here, numbered from 0")
    return chosen


@contextmanager
def joined(device: str, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Be a member of the group of all ranks, and yield the device of this one.

    The backend fits the device: nccl, xccl or gloo; gloo, too, where several ranks share an accelerator. Ranks on
    the CPU divide its cores, unless ``OMP_NUM_THREADS`` says otherwise.

    Args:
        device: As `device_of_rank` takes it, the same on all ranks.
        timeout: How long to wait for another rank.

    Raises:
        ParallelError: This process was not started as a rank, there is no such device, or ranks cannot share it.
    """
    if not launched():
        raise ParallelError("this process is no rank: start it with torchrun")
    mine = device_of_rank(device)
    backend = _BACKENDS.get(mine.type, "gloo")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if mine.type != "cpu":
        torch.accelerator.set_device_index(mine.index)
        places = torch.accelerator.device_count() if ":" not in device else 1
        if here > places:
            backend, shared = "gloo", f"{places} accelerators" if places > 1 else str(mine)  # nccl refuses that
            if mine.type not in dist.Backend.backend_capability[backend]:
                raise ParallelError(f"{here} ranks share {shared}, which gloo does not serve; give each its own")
            if os.environ["RANK"] == "0":
                _log.warning("%d ranks share %s: gloo carries what they exchange, through the host", here, shared)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    dist.init_process_group(backend, timeout=timeout)
    yield mine
    # Not after an exception: closing the connections would make the other ranks fail before this one has said why.
    dist.destroy_process_group()
