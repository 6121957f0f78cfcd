"""Functions that tests run as ranks; spawned processes import them by name."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.agreement import agree_on
from quantkit_runtime.parallel.launch import joined


def write_sum(folder):
    with joined("cpu"):
        total = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(total)
        Path(folder, f"rank{dist.get_rank()}").write_text(str(total.item()))


def refuse(rank):
    with joined("cpu"):
        if dist.get_rank() == rank:
            raise ParallelError("the file: a reason")
        dist.barrier()


def die(rank):
    with joined("cpu"):
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def wait_for_ever(folder):
    with joined("cpu"):
        Path(folder, f"pid{dist.get_rank()}").write_text(str(os.getpid()))
        time.sleep(600)


def agree(folder):
    with joined("cpu"):
        rank = dist.get_rank()
        found = [agree_on(7 + rank, 2**32, None)]
        try:
            agree_on(7, 5 + rank, None)
        except ParallelError as error:
            found.append(error)
        Path(folder, f"rank{rank}").write_text(" ".join(map(str, found)))
