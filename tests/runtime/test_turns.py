"""A library's call that takes turns with the thread that started it."""

import threading
from contextlib import contextmanager

import pytest
import torch

from quantkit_runtime.generation.turns import Turns


def test_the_call_runs_only_while_it_is_stepped():
    seen = []

    def call(give_way):
        for number in range(3):
            seen.append(number)
            give_way()
        return "done"

    turns = Turns(call)
    assert seen == []
    for count in range(1, 4):
        assert not turns.step()
        assert len(seen) == count
    assert turns.step()
    assert turns.result == "done"


def test_what_the_call_raises_is_raised_by_its_step():
    def call(give_way):
        give_way()
        raise ValueError("no")

    turns = Turns(call)
    assert not turns.step()
    with pytest.raises(ValueError, match="no"):
        turns.step()


def test_a_call_that_is_stopped_ends_where_it_waits():
    ended = []

    def call(give_way):
        try:
            while True:
                give_way()
        finally:
            ended.append(threading.current_thread().name)

    turns = Turns(call)
    turns.step()
    turns.stop()
    assert ended == ["turns"]


def test_the_call_runs_on_the_accelerator_of_its_starter(monkeypatch):
    """A new thread would begin on the first one, and ranks would meet there."""
    entered = []

    @contextmanager
    def device_index(index):
        entered.append((index, threading.current_thread().name))
        yield

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    turns = Turns(lambda give_way: give_way())
    assert not turns.step()
    assert entered == [(3, "turns")]
    assert turns.step()
