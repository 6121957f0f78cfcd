"""Mixed requests while engines are killed, stopped and run out of memory: none is lost, none answered twice.

``QUANTKIT_SOAK_REQUESTS`` is how many there are; ``make test-soak`` sends a thousand.
``QUANTKIT_SOAK_REPORT`` is a file to write what became of them, and the memory over time.
"""

import base64
import dataclasses
import io
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest
import serving
from PIL import Image
from tiny.chat import build_chat, round_chat

from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Limits, Settings
from quantkit_runtime.server.supervisor import Patience

REQUESTS = int(os.environ.get("QUANTKIT_SOAK_REQUESTS", "120"))
CALLERS = 16
FAULTS = max(4, REQUESTS // 80)
MIX = {"image": 40, "chat": 15, "stream": 15, "video": 8, "job": 8, "oom": 6, "bad": 8}
SEEDS = 3
CHAT, VIDEOS = "/v1/chat/completions", "/v1/videos"
DRAW = {"prompt": "a red circle", "size": "32x32", "num_inference_steps": 3, "max_sequence_length": 16}
FILM = {
    "prompt": "a red circle",
    "size": "32x32",
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
}
BAD = [
    (serving.IMAGES, {**DRAW, "size": "33x33"}, 400),
    (serving.IMAGES, {**DRAW, "colour": "red"}, 400),
    (serving.IMAGES, {**DRAW, "seed": -1}, 400),
    (serving.IMAGES, {**DRAW, "model": "other"}, 404),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}, 400),
    (f"{VIDEOS}/sync", FILM, 415),  # not a form
]
ENGINES = ("image", "chat", "video")
MOST_GROWTH_MB = 64
# Levels in any pixel of a picture: those drawn together differ in the last bits from those drawn alone.
MOST_AWAY = 2


class Caller:
    """Asks, and says what became of it; what a request gets alone is what it must get under load."""

    def __init__(self, client):
        self.client = client
        self.alone = {}
        self.jobs = {}

    def learn(self):
        for kind, seed in itertools.product(("image", "chat", "stream", "video"), range(SEEDS)):
            outcome, self.alone[kind, seed] = getattr(self, kind)(seed)
            assert outcome == 200
        assert all(self.alone["chat", seed] == self.alone["stream", seed] for seed in range(SEEDS))
        assert len({self.alone["chat", seed] for seed in range(SEEDS)}) > 1
        pairs = itertools.combinations(range(SEEDS), 2)
        for one, other in pairs:  # so that nobody gets another's
            assert np.abs(self.alone["image", one] - self.alone["image", other]).max() > 2 * MOST_AWAY
            assert not np.array_equal(self.alone["video", one], self.alone["video", other])

    def ask(self, kind, number):
        """Return the status, or ``cut`` of a stream that ended with an error."""
        seed = number % SEEDS
        outcome, result = getattr(self, kind)(number if kind in ("bad", "job") else seed)
        if outcome == 200 and kind == "image":
            assert np.abs(result - self.alone[kind, seed]).max() <= MOST_AWAY
        elif outcome == 200 and kind == "video":
            assert np.array_equal(result, self.alone[kind, seed])
        elif outcome == 200 and kind in ("chat", "stream"):
            assert result == self.alone[kind, seed]
        return outcome

    def image(self, seed):
        answer = self.client.post(serving.IMAGES, json={**DRAW, "seed": seed})
        if answer.status_code != 200:
            return answer.status_code, None
        [item] = answer.json()["data"]
        return 200, np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), dtype=int)

    def oom(self, _seed):
        return self.client.post(serving.IMAGES, json={**DRAW, "prompt": "oom"}).status_code, None

    def bad(self, number):
        path, body, expected = BAD[number % len(BAD)]
        answer = self.client.post(path, json=body)
        assert (answer.status_code, set(answer.json())) == (expected, {"error"})
        return answer.status_code, None

    def chat(self, seed):
        answer = self.client.post(CHAT, json=_talk(seed))
        return answer.status_code, answer.json()["choices"][0]["message"]["content"] if answer.is_success else None

    def stream(self, seed):
        with self.client.stream("POST", CHAT, json={**_talk(seed), "stream": True}) as answer:
            if answer.status_code != 200:
                return answer.status_code, None
            *pieces, end = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert end == "[DONE]"
        *pieces, last = map(json.loads, pieces)
        if "error" in last:
            assert last["error"]["code"] == "engine_down"
            return "cut", None
        assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * len(pieces)
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        return 200, "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)

    def video(self, seed):
        answer = self.client.post(f"{VIDEOS}/sync", files=_form({**FILM, "seed": seed}))
        return answer.status_code, _frames(answer.content) if answer.is_success else None

    def job(self, number):
        answer = self.client.post(
            VIDEOS, files=_form({**FILM, "seed": number % SEEDS}), headers={"Idempotency-Key": str(number)}
        )
        if answer.is_success:
            self.jobs[answer.json()["id"]] = number % SEEDS
        return answer.status_code, None


def _talk(seed):
    return {"messages": [{"role": "user", "content": f"red {seed}"}], "temperature": 0, "max_tokens": 24}


def _form(fields):
    return {name: (None, str(value)) for name, value in fields.items()}


def _frames(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def _rss_mb(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.fixture(scope="module")
def settings(rtn_checkpoint, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    chat = round_chat(build_chat(folder / "bf16"), folder / "chat")
    faulty = {"loader": "serving:load_with_faults"}
    specs = {
        "image": ModelSpec(path=str(rtn_checkpoint), dtype="float32", warm_up=False, **faulty),
        "chat": ModelSpec(path=str(chat), dtype="float32", warm_up=False),
        "video": ModelSpec(path=str(tiny_model("wan_t2v")), dtype="float32", warm_up=False, **faulty),
    }
    return Settings(
        models=specs,
        port=0,
        state_dir=folder / "state",
        limits=Limits(max_queue=256),
        patience=Patience(ping_s=0.5, silence_s=3.0),
        log_format="text",
    )


@pytest.mark.timeout(60 + 3 * REQUESTS)
def test_every_request_is_answered_once_and_every_job_is_kept(settings, tmp_path):
    kinds = random.Random(0).choices(list(MIX), list(MIX.values()), k=REQUESTS)
    answered, samples, faults = Counter(), [], []
    done, counting = threading.Event(), threading.Lock()
    with serving.running(settings) as server, httpx2.Client(base_url=server.url, timeout=120) as client:
        deployments = server.context.deployments.by_name
        caller = Caller(client)
        caller.learn()
        began = time.monotonic()

        def ask(number):
            try:
                outcome = caller.ask(kinds[number], number)
            except httpx2.TimeoutException as error:
                states = {
                    name: (d.engine.state, d.engine.reason, d.scheduler.running) for name, d in deployments.items()
                }
                raise AssertionError(f"{kinds[number]}: no answer; {states}") from error
            with counting:
                answered[kinds[number], outcome] += 1

        def sample():
            pids = [deployments[name].engine.pids for name in ENGINES]
            engines = [_rss_mb(pid[0]) if pid and Path(f"/proc/{pid[0]}").exists() else None for pid in pids]
            samples.append((time.monotonic() - began, answered.total(), _rss_mb(os.getpid()), *engines))

        def disturb():
            """Kill or stop the engines in turn, evenly over the run."""
            faulty = zip(itertools.cycle((signal.SIGKILL, signal.SIGSTOP)), itertools.cycle(ENGINES), strict=False)
            for index, (number, name) in zip(range(FAULTS), faulty, strict=False):
                while answered.total() < (index + 1) * REQUESTS // (FAULTS + 1):
                    if done.wait(0.05):
                        return
                engine = deployments[name].engine
                os.kill(engine.pids[0], number)
                serving.until(lambda engine=engine: not engine.is_ready, 60)
                serving.until(lambda engine=engine: engine.is_ready, 120)
                faults.append(name)
                sample()

        with ThreadPoolExecutor(CALLERS) as pool, ThreadPoolExecutor(1) as other:
            disturbing = other.submit(disturb)
            try:
                for _ in pool.map(ask, range(REQUESTS)):
                    pass
            finally:
                done.set()
            disturbing.result()
        ended = {name: _ended(client, name) - SEEDS for name in ("image", "chat")}
        for number in range(REQUESTS, REQUESTS + 3):  # these wait when the server ends
            assert caller.job(number)[0] == 200
        sample()
        lost = {name: deployments[name].engine.restarts for name in ENGINES}
    report = _report(answered, samples, lost, time.monotonic() - began)
    Path(os.environ.get("QUANTKIT_SOAK_REPORT", tmp_path / "soak.txt")).write_text(report)

    assert Counter(faults) == Counter(name for name, count in lost.items() for _ in range(count))
    assert len(faults) == FAULTS
    assert answered.total() == REQUESTS
    of = Counter(kinds)
    assert ended == {"image": of["image"] + of["oom"], "chat": of["chat"] + of["stream"] + SEEDS}  # each once
    expected = {"oom": {507, 503}, "bad": {400, 404, 415}, "job": {200}, "stream": {200, 503, "cut"}}
    for (kind, outcome), count in answered.items():
        assert outcome in expected.get(kind, {200, 503}), (kind, outcome, count)
    # What runs when its engine is lost runs again; only a stream that has begun, or a second loss, is told so.
    unlucky = sum(count for (_, outcome), count in answered.items() if outcome in (503, "cut"))
    assert unlucky <= 8 * FAULTS
    half = [row[2] for row in samples[len(samples) // 2 :]]
    assert half[-1] - half[0] < MOST_GROWTH_MB

    only_videos = {"video": settings.models["video"]}
    with (
        serving.running(dataclasses.replace(settings, models=only_videos)) as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        _check_jobs(client, caller)


def _check_jobs(client, caller):
    """Every job that was accepted is there, and has its video; only an engine that was lost twice may fail one."""
    assert len(caller.jobs) > 3
    for identity, seed in caller.jobs.items():
        serving.until(lambda: client.get(f"{VIDEOS}/{identity}").json()["status"] in ("completed", "failed"), 120)  # noqa: B023
        job = client.get(f"{VIDEOS}/{identity}").json()
        if job["status"] == "failed":
            assert job["error"]["code"] == "engine_down"
            continue
        frames = _frames(client.get(f"{VIDEOS}/{identity}/content").content)
        assert np.array_equal(frames, caller.alone["video", seed])
    listed, after = [], {}
    while True:
        page = client.get(VIDEOS, params={"limit": 100, **after}).json()
        listed += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert sorted(listed) == sorted(caller.jobs)


def _ended(client, model):
    lines = client.get("/metrics").text.splitlines()
    mark = f'model="{model}"'
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("quantkit_requests_total{") and mark in line
    )


def _report(answered, samples, lost, seconds):
    lines = [f"{answered.total()} requests in {seconds:.0f} s by {CALLERS} callers; engines lost: {lost}"]
    lines += [f"{kind:8}{outcome!s:>4}{count:5}" for (kind, outcome), count in sorted(answered.items(), key=str)]
    lines += ["resident MB", "".join(f"{name:>9}" for name in ("s", "answers", "http", *ENGINES))]
    lines += ["".join(f"{'' if value is None else round(value):>9}" for value in row) for row in samples]
    return "\n".join(lines) + "\n"
