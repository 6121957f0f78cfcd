"""Progress lines say how much time is left, from the units this run has done itself."""

import pytest

from quantkit.cli import progress
from quantkit.cli.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def set_to(seconds):
        now[0] = seconds

    return set_to


def test_units_of_an_earlier_run_do_not_count_for_the_time_left(clock, capsys):
    with Bar() as bar:
        bar("tuning blocks", 10, 20, "blocks.10")
        clock(3600)
        bar("tuning blocks", 11, 20, "blocks.10", "loss 0.5 to 0.25")
        clock(7200)
        bar("tuning blocks", 12, 20, "blocks.11", "loss 0.4 to 0.2")
    assert capsys.readouterr().err.splitlines() == [
        "tuning blocks: 11/20 in 1 h 00 min, 9 h 00 min left, blocks.10: loss 0.5 to 0.25",
        "tuning blocks: 12/20 in 2 h 00 min, 8 h 00 min left, blocks.11: loss 0.4 to 0.2",
    ]


def test_quick_units_share_a_line(clock, capsys):
    with Bar() as bar:
        for done in range(1, 31):
            clock(done)
            bar("hashing files", done, 30)
    assert capsys.readouterr().err.splitlines() == [
        "hashing files: 11/30 in 10 s, 19 s left",
        "hashing files: 21/30 in 20 s, 9 s left",
        "hashing files: 30/30 in 29 s",
    ]


def test_a_note_is_printed_as_it_is(capsys):
    with Bar() as bar:
        bar.note("starting over: layers[0] changed")
    assert capsys.readouterr().err == "note: starting over: layers[0] changed\n"
