"""Starting ranks: they form a group, fail together, and end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.launch import device_of_rank, joined, launch

pytestmark = pytest.mark.multi_rank


def test_ranks_form_a_group(tmp_path):
    launch(ranks.write_sum, (str(tmp_path),), 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rank0": "3.0", "rank1": "3.0"}


def test_the_error_of_one_rank_ends_all_and_is_told_with_its_traceback():
    with pytest.raises(ParallelError, match=r"^rank 1: the file: a reason") as caught:
        launch(ranks.refuse, (1,), 2)
    assert "in refuse" in "".join(caught.value.__notes__)


def test_a_killed_rank_ends_all():
    with pytest.raises(ParallelError, match=r"^rank 1: Signal 9 \(SIGKILL\)"):
        launch(ranks.die, (1,), 2)


def test_a_signal_to_the_starter_ends_the_ranks(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, ranks\n"
        "from quantkit_runtime.parallel.launch import launch\n"
        "if __name__ == '__main__':\n"
        "    launch(ranks.wait_for_ever, (sys.argv[1],), 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(ranks.__file__).parent), *sys.path])}
    starter = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        pids = wait_for(lambda: [int(path.read_text() or 0) for path in tmp_path.glob("pid*")], 2)
        starter.send_signal(signal.SIGTERM)
        assert starter.wait(timeout=60) == -signal.SIGTERM
        wait_for(lambda: [pid for pid in pids if not Path(f"/proc/{pid}").exists()], 2)
    finally:
        starter.kill()


def wait_for(found, count, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(values := found()) == count and all(values):
            return values
        time.sleep(0.1)
    raise AssertionError(f"not {count} within {seconds} s: {found()}")


def test_a_process_that_is_no_rank_is_told_to_use_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="start it with torchrun"), joined(device_of_rank("cpu")):
        pass


def test_a_numbered_device_is_refused():
    with pytest.raises(ParallelError, match="leave the number out"):
        device_of_rank("cuda:1")
