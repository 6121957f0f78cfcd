"""Starting ranks that run a list of jobs, and what each of them made of every one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import rank_jobs
import torch

MOST_GROWTH_BYTES = 8 * 2**20


def launch(jobs, folder, *, ranks):
    """Run jobs with torchrun; every rank has one thread."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(rank_jobs.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script]
    return subprocess.run(
        [*map(str, command), str(folder / "jobs.json"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def results(jobs, folder, *, ranks):
    """Run jobs and return what the ranks left, by the job's name."""
    done = launch(jobs, folder, ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    return {
        job["name"]: [torch.load(folder / f"{job['name']}-rank{rank}.pt") for rank in range(ranks)] for job in jobs
    }


def assert_no_growth(ranks):
    """Assert that no rank of a job that was repeated held more at its end than after the rounds to warm up."""
    for rank in ranks:
        assert rank["end_bytes"] - rank["warm_bytes"] < MOST_GROWTH_BYTES
