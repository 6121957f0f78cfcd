"""A chat model on two ranks, with a model that repeats words: ranks that do not do the same are started anew."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pytest
import serving

PATH = "/v1/chat/completions"
WORDS = " ".join(["word"] * 40)  # 0.8 s

pytestmark = pytest.mark.multi_rank


@pytest.fixture(scope="module")
def client(settings):
    models = {"chat": replace(serving.spec("chat"), tensor_parallel=2)}
    with (
        serving.running(settings(models=models, max_tokens=128)) as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        client.server = server
        yield client


@pytest.fixture
def pids(client):
    """Processes of the two ranks, idle and ready."""
    serving.until(lambda: client.get("/ready").status_code == 200)
    first, second = client.server.engine.pids
    return first, second


def ask(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def answer_of(response):
    return response.json()["choices"][0]["message"]["content"]


def stream(client, text):
    """Return the text that was streamed, and the error that ended it."""
    written, error = "", None
    with client.stream("POST", PATH, json=ask(text, stream=True)) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            error = chunk.get("error", error)
            for choice in chunk.get("choices", ()):
                written += choice["delta"].get("content", "")
    return written, error


def test_several_chats_are_written_at_once_and_one_that_is_left_leaves_the_others(client, pids):
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, PATH, json=ask(f"{n} {WORDS}")) for n in range(3)]
        with client.stream("POST", PATH, json=ask(" ".join("w" * 120), stream=True)) as left:
            next(left.iter_lines())
            serving.until(lambda: client.server.scheduler.running == 4)
        answers = [answer_of(one.result()) for one in waiting]
    serving.until(lambda: not client.server.scheduler.running, 0.6)  # 1.6 s of words were left
    assert answers == [f"{n} {WORDS} " for n in range(3)]
    assert client.post(PATH, json=ask("refuse")).status_code == 400
    assert answer_of(client.post(PATH, json=ask("one two"))) == "one two "
    assert tuple(client.server.engine.pids) == pids


def test_what_fails_alike_on_all_ranks_fails_that_request_alone(client, pids):
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(stream, client, WORDS)
        assert client.post(PATH, json=ask("fail")).status_code == 500
        assert beside.result() == (f"{WORDS} ", None)
    assert tuple(client.server.engine.pids) == pids


def test_ranks_that_choose_other_tokens_are_started_anew(client, pids):
    written, error = stream(client, f"one apart {WORDS}")
    assert written == "one apart "  # nothing is written after what they do not agree on
    assert error["code"] == "engine_down"
    assert "the ranks have drifted apart: what rank 1 made differs" in error["message"]
    assert answer_of(client.post(PATH, json=ask("one two"))) == "one two "
    assert not set(client.server.engine.pids) & set(pids)


def test_a_request_that_one_rank_alone_cannot_admit_runs_again(client, pids, tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    text = f"fail-alone:{flag}"
    assert answer_of(client.post(PATH, json=ask(text))) == f"{text} "
    assert not flag.exists()
    assert not set(client.server.engine.pids) & set(pids)
