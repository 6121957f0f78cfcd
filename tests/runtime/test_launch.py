"""Starting ranks: they form a group, fail together, and end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.launch import joined, launch

pytestmark = pytest.mark.multi_rank


def test_ranks_form_a_group(tmp_path):
    launch(ranks.write_sum, (str(tmp_path),), 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rank0": "3.0", "rank1": "3.0"}


def test_ranks_take_the_first_ones_value_if_they_have_done_the_same_and_else_all_are_told_who_differs(tmp_path):
    launch(ranks.agree, (str(tmp_path),), 2)
    for rank in (0, 1):
        assert (
            (tmp_path / f"rank{rank}")
            .read_text()
            .startswith("7 the ranks have drifted apart: what rank 1 made differs from what rank 0 made; ")
        )


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
    with pytest.raises(ParallelError, match="start it with torchrun"), joined("cpu"):
        pass


@pytest.fixture
def join(monkeypatch):
    """Join as a rank where there are accelerators: ``device, backend = join("cuda", rank=1, ranks=2, cards=1)``."""

    def call(device, *, rank, ranks, cards):
        for name, value in (
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", ranks),
            ("LOCAL_WORLD_SIZE", ranks),
        ):
            monkeypatch.setenv(name, str(value))
        chosen = []
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: cards)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        with joined(device) as mine:
            index, backend = chosen
        assert index == mine.index
        return str(mine), backend

    return call


def test_ranks_take_an_accelerator_each_and_nccl(join, caplog):
    assert join("cuda", rank=0, ranks=2, cards=2) == ("cuda:0", "nccl")
    assert join("cuda", rank=1, ranks=2, cards=2) == ("cuda:1", "nccl")
    assert join("xpu", rank=1, ranks=2, cards=2) == ("xpu:1", "xccl")
    assert join("cuda:1", rank=0, ranks=1, cards=2) == ("cuda:1", "nccl")
    assert not caplog.messages


def test_ranks_that_share_an_accelerator_use_gloo_and_one_of_them_says_so(join, caplog):
    assert join("cuda", rank=1, ranks=2, cards=1) == ("cuda:0", "gloo")
    assert join("cuda", rank=3, ranks=4, cards=2) == ("cuda:1", "gloo")
    assert [join("cuda:0", rank=rank, ranks=2, cards=2) for rank in (1, 0)] == [("cuda:0", "gloo")] * 2
    assert caplog.messages == ["2 ranks share cuda:0: gloo carries what they exchange, through the host"]


def test_ranks_that_share_what_gloo_does_not_serve_are_refused(join):
    with pytest.raises(ParallelError, match=r"^2 ranks share xpu:0, which gloo does not serve; give each its own"):
        join("xpu", rank=0, ranks=2, cards=1)


def test_an_accelerator_that_is_not_there_is_refused(join):
    with pytest.raises(ParallelError, match=r"^device 'cuda:2': there are 2 accelerators here, numbered from 0$"):
        join("cuda:2", rank=0, ranks=2, cards=2)
