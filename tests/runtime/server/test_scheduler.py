"""Whose turn it is: order, batches and repeats, with an engine that only notes what it is sent."""

import asyncio

import pytest

from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.metrics import Metrics
from quantkit_runtime.server.protocol import (
    Cancel,
    ChatRequest,
    Delta,
    Failed,
    Finished,
    ImageRequest,
    ModelInfo,
    Progress,
    Run,
)
from quantkit_runtime.server.scheduler import Scheduler


class Notebook:
    """Stands in for the engine's processes."""

    def __init__(self, **info):
        self.info = ModelInfo(**{"kinds": frozenset({"image"}), "parameters": frozenset(), "max_batch": 4, **info})
        self.state = "ready"
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def mark_progress(self):
        pass

    def watch_progress_while(self, busy):
        self.busy = busy

    @property
    def runs(self):
        return [[request.id for request in message.requests] for message in self.sent if isinstance(message, Run)]

    def finish(self, *ids):
        for identity in ids:
            self.on_event(Finished(identity, None, 1.0, 0))

    def lose(self):
        self.state = "down"
        self.on_down("gone")
        self.state = "ready"
        self.on_ready()


def picture(identity, n=1, width=64, **options):
    return ImageRequest(identity, "x", tuple(range(n)), width, 64, options)


def chat(identity):
    return ChatRequest(identity, (), 8)


@pytest.fixture
def engine():
    return Notebook()


@pytest.fixture
def run():
    """Run a coroutine function in a loop of its own."""
    return asyncio.run


def scheduler_of(engine, **changes):
    return Scheduler(engine, Metrics(), model="m", **{"max_queue": 100, **changes})


def test_clients_take_turns_however_many_requests_one_has(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        for index in range(4):
            scheduler.submit(picture(f"a{index}", width=16 * (index + 1)), "a", timeout_s=None)
        scheduler.submit(picture("b0", width=640), "b", timeout_s=None)
        for identity in ("a0", "a1", "b0", "a2"):
            engine.finish(identity)
        assert engine.runs == [["a0"], ["a1"], ["b0"], ["a2"], ["a3"]]

    run(body())


def test_a_client_of_many_users_gets_no_more_turns_and_its_users_share_them(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        width = iter(range(16, 1000, 16))  # so that none fits together
        for user in "ux":
            for index in range(2):
                asked = picture(f"a-{user}{index}", width=next(width))
                scheduler.submit(asked, "a", user=user, timeout_s=None)
        for index in range(3):
            scheduler.submit(picture(f"b{index}", width=next(width)), "b", timeout_s=None)
        for _ in range(6):
            engine.finish(*engine.runs[-1])
        assert [run[0] for run in engine.runs] == ["a-u0", "a-u1", "b0", "a-x0", "b1", "a-x1", "b2"]

    run(body())


def test_what_fits_together_runs_together_up_to_the_limit(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        for identity, n, width in (("first", 1, 64), ("a", 2, 64), ("other", 1, 32), ("b", 1, 64), ("c", 2, 64)):
            scheduler.submit(picture(identity, n, width), "me", timeout_s=None)
        engine.finish("first")
        engine.finish("a", "b")
        engine.finish("other")
        assert engine.runs == [["first"], ["a", "b"], ["other"], ["c"]]

    run(body())


def test_other_steps_or_guidance_never_run_together(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        scheduler.submit(picture("first"), "me", timeout_s=None)
        scheduler.submit(picture("a", num_inference_steps=2), "me", timeout_s=None)
        scheduler.submit(picture("b", num_inference_steps=3), "me", timeout_s=None)
        engine.finish("first")
        assert engine.runs == [["first"], ["a"]]

    run(body())


def test_a_lost_batch_runs_again_one_by_one_and_before_others(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        scheduler.submit(picture("first"), "me", timeout_s=None)
        tickets = [scheduler.submit(picture(identity), "me", timeout_s=None) for identity in ("a", "b", "c")]
        engine.finish("first")
        scheduler.submit(picture("d"), "me", timeout_s=None)
        engine.lose()
        assert engine.runs[1:] == [["a", "b", "c"], ["a"]]  # one of them may be what ended it
        engine.lose()
        assert (await tickets[0].events.get()).kind == "engine_down"
        for identity in ("b", "c"):
            engine.finish(identity)
        assert engine.runs[3:] == [["b"], ["c"], ["d"]]

    run(body())


def test_a_late_result_of_a_lost_engine_is_not_delivered_twice(engine, run):
    async def body():
        scheduler = scheduler_of(engine)
        ticket = scheduler.submit(picture("a"), "me", timeout_s=None)
        engine.finish("a")
        engine.finish("a")
        engine.on_event(Failed("a", "internal", ""))
        engine.on_event(Progress("unknown", 1, 2, 0.1))
        assert ticket.events.qsize() == 1

    run(body())


def test_a_timeout_in_the_queue_frees_the_place_and_in_the_engine_cancels(engine, run):
    async def body():
        scheduler = scheduler_of(engine, max_queue=1)
        running = scheduler.submit(picture("a"), "me", timeout_s=0.01)
        waiting = scheduler.submit(picture("b"), "me", timeout_s=0.01)
        with pytest.raises(ApiError) as caught:
            scheduler.submit(picture("c"), "me", timeout_s=None)
        assert caught.value.status == 429
        await asyncio.sleep(0.05)
        assert [(await ticket.events.get()).kind for ticket in (running, waiting)] == ["timeout", "timeout"]
        assert scheduler.waiting == 0
        assert Cancel("a") in engine.sent
        scheduler.submit(picture("d"), "me", timeout_s=None)
        assert engine.runs == [["a"]]  # the engine is free when it says so
        engine.on_event(Failed("a", "cancelled", ""))
        assert engine.runs == [["a"], ["d"]]

    run(body())


def test_chats_are_sent_one_by_one_as_long_as_the_model_takes_more(run):
    async def body():
        engine = Notebook(kinds=frozenset({"chat"}), max_batch=2)
        scheduler = scheduler_of(engine)
        for identity in ("a", "b", "c"):
            scheduler.submit(chat(identity), "me", timeout_s=None)
        assert engine.runs == [["a"], ["b"]]
        engine.finish("b")
        assert engine.runs == [["a"], ["b"], ["c"]]

    run(body())


@pytest.fixture
def both():
    """An engine that draws one picture beside two chats."""
    return Notebook(kinds=frozenset({"chat", "image"}), max_batch=2)


def test_beside_chats_one_picture_is_drawn_and_those_that_wait_keep_nobody(both, run):
    async def body():
        scheduler = scheduler_of(both)
        tickets = [scheduler.submit(picture(f"p{n}"), "me", timeout_s=None) for n in range(3)]
        for n in range(3):
            scheduler.submit(chat(f"c{n}"), "me", timeout_s=None)
        assert both.runs == [["p0"], ["c0"], ["c1"]]
        assert [ticket.wait_s is None for ticket in tickets] == [False, True, True]
        both.finish("c0")
        both.finish("p0")
        assert both.runs[3:] == [["c2"], ["p1"]]
        scheduler.cancel(tickets[1])
        assert len(both.runs) == 5  # the place is free when the engine says so
        both.on_event(Failed("p1", "cancelled", ""))
        assert both.runs[5:] == [["p2"]]

    run(body())


def test_turns_for_pictures_and_turns_for_chats_go_round_apart(both, run):
    async def body():
        scheduler = scheduler_of(both)
        for n in range(3):
            scheduler.submit(picture(f"a-p{n}"), "a", timeout_s=None)
        for n in range(4):
            scheduler.submit(chat(f"b-c{n}"), "b", timeout_s=None)
        scheduler.submit(picture("b-p0"), "b", timeout_s=None)
        for n in range(2):
            scheduler.submit(chat(f"a-c{n}"), "a", timeout_s=None)
        assert both.runs == [["a-p0"], ["b-c0"], ["b-c1"]]
        for n in range(2):
            both.finish(f"b-c{n}")
        assert both.runs[3:] == [["b-c2"], ["a-c0"]]
        both.finish("b-c2")
        assert both.runs[5:] == [["b-c3"]]
        both.finish("a-p0")  # a's first picture was before b's, its second is not, whatever b has written
        both.finish("a-p1")
        assert both.runs[6:] == [["a-p1"], ["b-p0"]]

    run(body())


def test_what_a_lost_engine_drew_and_wrote_runs_again_before_others(both, run):
    async def body():
        scheduler = scheduler_of(both)
        for request in (picture("p0"), picture("p1"), chat("c0"), chat("c1"), chat("c2")):
            scheduler.submit(request, "me", timeout_s=None)
        both.lose()
        assert sorted(both.runs[3:]) == [["c0"], ["c1"], ["p0"]]

    run(body())


def test_an_answer_of_which_nothing_is_out_is_written_again_from_its_beginning(run):
    async def body():
        engine = Notebook(kinds=frozenset({"chat"}))
        scheduler = scheduler_of(engine)
        whole = scheduler.submit(chat("whole"), "me", timeout_s=None)
        streamed = scheduler.submit(chat("streamed"), "me", timeout_s=None, streams=True)
        for identity in ("whole", "streamed"):
            engine.on_event(Delta(identity, "lost"))
        engine.lose()
        assert [type(streamed.events.get_nowait()) for _ in range(2)] == [Delta, Failed]
        assert engine.runs == [["whole"], ["streamed"], ["whole"]]
        engine.on_event(Delta("whole", "again"))
        engine.finish("whole")
        assert whole.events.get_nowait().text == "again"
        assert isinstance(whole.events.get_nowait(), Finished)

    run(body())


def test_an_engine_that_never_came_up_fails_what_waits_and_refuses_more(engine, run):
    async def body():
        engine.state = "starting"
        scheduler = scheduler_of(engine)
        ticket = scheduler.submit(picture("a"), "me", timeout_s=None)
        engine.state, engine.reason = "failed", "no weights"
        engine.on_down("no weights")
        assert (await ticket.events.get()).kind == "engine_down"
        with pytest.raises(ApiError, match="no weights"):
            scheduler.submit(picture("b"), "me", timeout_s=None)

    run(body())
