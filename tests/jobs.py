"""Starting ranks that run a list of jobs, and what each of them made of every one."""

import multiprocessing
import os
import socket
import time

import rank_jobs
import torch

MOST_GROWTH_BYTES = 8 * 2**20
TIMEOUT_S = 600
# Ranks are forked from a process that has imported what takes seconds, and nothing else: it has run no job.
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(
    ["quantkit_runtime.load"]
    + [f"diffusers.pipelines.{name}.pipeline_{name}" for name in ("flux", "glm_image", "ovis_image", "wan")]
)


def launch(jobs, folder, *, ranks):
    """Run jobs on that many ranks of this machine, one thread each; return how each rank ended."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = [_RANKS.Process(target=_run, args=(rank, ranks, port, jobs, folder)) for rank in range(ranks)]
    for process in started:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()


def _run(rank, ranks, port, jobs, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    rank_jobs.run(jobs, folder)


def results(jobs, folder, *, ranks):
    """Run jobs and return what the ranks left, by the job's name."""
    assert launch(jobs, folder, ranks=ranks) == [0] * ranks  # their tracebacks stand in the captured output
    return read(jobs, folder, ranks=ranks)


def read(jobs, folder, *, ranks):
    """Return what the ranks left of jobs, by the job's name."""
    return {
        job["name"]: [torch.load(folder / f"{job['name']}-rank{rank}.pt") for rank in range(ranks)] for job in jobs
    }


def assert_no_growth(ranks):
    """Assert that no rank of a job that was repeated held more at its end than after the rounds to warm up."""
    for rank in ranks:
        assert rank["end_bytes"] - rank["warm_bytes"] < MOST_GROWTH_BYTES
