"""What requests are told that outlast the drain after SIGTERM."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import serving

SLOW = {"prompt": "slow", "num_inference_steps": 50}  # 5 s
TALK = {"messages": [{"role": "user", "content": " ".join(["word"] * 60)}], "max_tokens": 60}  # 1.2 s
DRAIN_S = 0.4


def post(server, path, body):
    return httpx2.post(f"{server.url}{path}", json=body, timeout=30)


@pytest.fixture
def draining(settings):
    """Ask for ``requests`` (path and body), and stop the server while they run; returns the answers."""

    def run(kind, *requests, running=1):
        with ThreadPoolExecutor(len(requests)) as pool:
            with serving.running(settings(kind, drain_s=DRAIN_S)) as server:
                waiting = [pool.submit(post, server, *request) for request in requests]
                serving.until(lambda: server.scheduler.running == running)
                serving.until(lambda: server.scheduler.waiting == len(requests) - running)
                began = time.monotonic()
            assert time.monotonic() - began < DRAIN_S + 3
            return [answer.result() for answer in waiting]

    return run


def assert_told(error):
    assert (error["code"], error["type"]) == ("server_stopping", "server_error")
    assert error["message"] == f"the server stops; what runs gets {DRAIN_S} s to end"


def test_what_runs_and_what_waits_is_503_with_the_reason(draining):
    other = {**SLOW, "size": "32x32"}
    for answer in draining("images", (serving.IMAGES, SLOW), (serving.IMAGES, other)):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert_told(answer.json()["error"])


def test_a_stream_of_pictures_ends_with_an_error_event(draining):
    [answer] = draining("images", (serving.IMAGES, {**SLOW, "stream": True}))
    *progress, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert progress
    kind, data = last.split("\n")
    assert kind == "event: error"
    assert_told(json.loads(data.removeprefix("data: "))["error"])


def test_a_chat_is_503_and_a_stream_of_one_ends_with_an_error(draining):
    path = "/v1/chat/completions"
    whole, stream = draining("chat", (path, TALK), (path, {**TALK, "stream": True}), running=2)
    assert whole.status_code == 503
    assert_told(whole.json()["error"])
    *pieces, error, end = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert end == "[DONE]"
    assert len(pieces) > 1
    assert_told(json.loads(error)["error"])


def test_what_ends_within_the_drain_is_answered(draining):
    [answer] = draining("images", (serving.IMAGES, {"prompt": "slow", "num_inference_steps": 3}))
    assert answer.status_code == 200


def test_an_upload_that_never_ends_is_503_too(settings):
    with serving.running(settings("images", drain_s=0.0)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        caller = socket.create_connection((host, int(port)), timeout=30)
        head = f"POST {serving.IMAGES} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.2)
    with caller, caller.makefile("rb") as answer:
        assert b" 503 " in answer.readline()
        assert b"server_stopping" in answer.read()


def test_a_job_that_waits_behind_what_outlasts_the_drain_is_kept(settings, tmp_path):
    def form(**fields):
        return {name: (None, str(value)) for name, value in fields.items()}

    choice = settings("videos", drain_s=DRAIN_S, state_dir=tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with serving.running(choice) as server:
            slow = pool.submit(httpx2.post, f"{server.url}/v1/videos/sync", files=form(**SLOW), timeout=30)
            serving.until(lambda: server.scheduler.running)
            job = httpx2.post(f"{server.url}/v1/videos", files=form(prompt="x")).json()["id"]
            serving.until(lambda: server.scheduler.waiting)
        assert slow.result().status_code == 503
    with serving.running(choice) as server:
        serving.until(lambda: httpx2.get(f"{server.url}/v1/videos/{job}").json()["status"] == "completed")


def test_engines_that_do_not_listen_yet_are_ended_side_by_side(settings, monkeypatch):
    monkeypatch.setattr("quantkit_runtime.server.supervisor._STOP_S", 1.0)
    choice = settings("images", "editor", "videos", "chat")
    loading = {name: replace(spec, loader="serving:load_slowly") for name, spec in choice.models.items()}
    with serving.running(replace(choice, models=loading), wait=False) as server:
        engines = [deployment.engine for deployment in server.context.deployments.by_name.values()]
        serving.until(lambda: all("import" in engine.phases for engine in engines))
        began = time.monotonic()
    assert time.monotonic() - began < 3


_SERVE = """
import os, signal, sys, tempfile, threading
from pathlib import Path
from quantkit_runtime.server import run
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Settings

def stop():
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

moment = sys.argv[1]
if moment == "begin":  # before uvicorn listens to signals
    bind = run.bind
    run.bind = lambda settings: stop() or bind(settings)
else:
    threading.Timer(3.0, stop).start()
spec = ModelSpec("x", loader="serving:load_slowly")
run.serve(Settings({"x": spec}, port=0, state_dir=Path(tempfile.mkdtemp()), drain_s=1, log_format="text"))
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["begin", "loading"])
def test_a_server_that_is_told_to_stop_before_it_is_ready_ends_well(moment, number):
    environment = {**os.environ, "PYTHONPATH": str(Path(serving.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, moment, number],
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stderr
