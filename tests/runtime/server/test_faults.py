"""What happens to requests when an engine crashes, hangs or runs out of memory, and when callers go away."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import serving
from serving import IMAGES as PATH
from serving import red, together

from quantkit_runtime.server.protocol import ModelSpec

ONE = {"prompt": "a cat", "seed": 3}


@pytest.fixture
def client(serve):
    client = serve("images", max_queue=64)
    serving.until(lambda: client.get("/ready").status_code == 200)
    return client


def post_all(client, bodies):
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: client.post(PATH, json=body), bodies))


def losses(client):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("quantkit_engine_losses_total{"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_under_load_a_killed_or_stopped_engine_loses_no_request(client, number):
    before = losses(client)
    bodies = [{"prompt": "slow", "seed": seed, "num_inference_steps": 3} for seed in range(12)]
    [victim] = client.server.engine.pids
    timer = threading.Timer(0.3, os.kill, (victim, number))
    timer.start()
    answers = post_all(client, bodies)
    timer.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert [red(answer) for answer in answers] == list(range(12))  # each its own, none another's
    assert losses(client) == before + 1
    assert client.server.engine.pids != [victim]
    assert not client.server.scheduler.waiting
    assert not client.server.scheduler.running


@pytest.mark.parametrize(
    ("kinds", "given", "policy"),
    [
        (("images",), None, None),
        (("images", "chat"), None, "PASSIVE"),
        (("images", "chat"), "ACTIVE", "ACTIVE"),
    ],
)
def test_engines_that_share_the_cores_wait_without_spinning(settings, monkeypatch, kinds, given, policy):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    with serving.running(settings(*kinds)) as server:
        for deployment in server.context.deployments.by_name.values():
            [pid] = deployment.engine.pids
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            assert [one for one in variables if one.startswith("OMP_WAIT_POLICY=")] == (
                [f"OMP_WAIT_POLICY={policy}"] if policy else []
            )


def test_ready_goes_red_and_green_again_while_requests_wait(client):
    assert client.get("/ready").status_code == 200
    os.kill(client.server.engine.pids[0], signal.SIGSTOP)
    serving.until(lambda: client.get("/ready").status_code == 503)
    assert client.get("/health").status_code == 200
    assert client.post(PATH, json=ONE).status_code == 200
    serving.until(lambda: client.get("/ready").status_code == 200)


def test_a_request_runs_again_once_and_its_caller_sees_nothing(client, tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    answer = client.post(PATH, json={"prompt": f"crash-once:{flag}", "seed": 9})
    assert (answer.status_code, red(answer)) == (200, 9)


def test_a_request_that_kills_the_engine_twice_is_told_so_and_others_live(client):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, PATH, json={"prompt": "crash"})
        time.sleep(0.1)
        other = client.post(PATH, json=ONE)
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert "killed by SIGKILL" in answer.json()["error"]["message"]
    assert other.status_code == 200


def test_out_of_memory_fails_the_request_and_not_the_engine(client):
    pids = client.server.engine.pids
    answer = client.post(PATH, json={"prompt": "oom"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "out_of_memory")
    assert answer.headers["x-should-retry"] == "false"
    assert client.post(PATH, json=ONE).status_code == 200
    assert client.server.engine.pids == pids


def test_what_is_too_much_together_runs_one_by_one(client):
    slow = {"prompt": "slow", "num_inference_steps": 5}
    pair = [{"prompt": "oom-together", "seed": 1}, {"prompt": "oom-together", "seed": 2}]
    answers = post_all(client, [slow, *pair])[1:]
    assert [(red(answer), together(answer)) for answer in answers] == [(1, 1), (2, 1)]


def test_a_defect_of_the_model_is_500_without_its_details(client):
    answer = client.post(PATH, json={"prompt": "fail"})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_a_request_that_takes_too_long_is_504_and_stops(serve):
    client = serve("images", request_timeout_s=0.5)
    answer = client.post(PATH, json={"prompt": "slow", "num_inference_steps": 40})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    serving.until(lambda: not client.server.scheduler.running, 1.0)  # 4 s of steps were left


def test_a_caller_that_goes_away_stops_its_run_at_the_next_step(client):
    with pytest.raises(httpx2.ReadTimeout):
        client.post(PATH, json={"prompt": "slow", "num_inference_steps": 50}, timeout=0.5)
    serving.until(lambda: not client.server.scheduler.running, 1.0)
    assert client.post(PATH, json=ONE).status_code == 200


def test_a_caller_that_leaves_a_stream_stops_its_run(client):
    with client.stream("POST", PATH, json={"prompt": "slow", "num_inference_steps": 50, "stream": True}) as answer:
        next(answer.iter_lines())
    serving.until(lambda: not client.server.scheduler.running, 1.0)


def test_a_caller_that_goes_away_leaves_the_queue(client):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, PATH, json={"prompt": "slow", "num_inference_steps": 10})
        serving.until(lambda: client.server.scheduler.running == 1)
        with pytest.raises(httpx2.ReadTimeout):
            client.post(PATH, json={"prompt": "slow", "num_inference_steps": 50}, timeout=0.2)
        serving.until(lambda: client.server.scheduler.waiting == 0, 0.5)
        assert first.result().status_code == 200


def test_a_full_queue_is_429_with_a_time_to_come_back(serve):
    client = serve("images", max_queue=2)
    answers = post_all(
        client, [{"prompt": "slow", "size": f"{16 * n}x16", "num_inference_steps": 3} for n in range(1, 6)]
    )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_requests_that_fit_run_together_and_others_apart(client):
    slow = {"prompt": "slow", "num_inference_steps": 10}
    same = [{"prompt": f"cat {seed}", "seed": seed} for seed in range(3)]
    other = {"prompt": "dog", "seed": 9, "size": "32x32"}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(client.post, PATH, json=slow)
        serving.until(lambda: client.server.scheduler.running)
        answers = post_all(client, [*same, other])
    assert [red(answer) for answer in answers] == [0, 1, 2, 9]
    assert [together(answer) for answer in answers] == [3, 3, 3, 1]


def test_a_model_that_never_loads_is_an_error_of_the_start(settings):
    with serving.running(settings("broken"), wait=False) as server:
        serving.until(server.context.started.done)
        assert "no such weights" in str(server.context.started.exception())


def test_an_engine_that_cannot_start_again_is_left_with_its_reason_and_its_jobs_wait(settings, tmp_path):
    file = tmp_path / "model"
    file.touch()
    models = {"videos": ModelSpec(str(file), loader="serving:load_videos_of_file")}
    choice = replace(settings("videos", state_dir=tmp_path / "state"), models=models)
    slow = {"prompt": (None, "slow"), "num_inference_steps": (None, "50")}
    with serving.running(choice) as server, httpx2.Client(base_url=server.url, timeout=30) as client:
        jobs = [client.post("/v1/videos", files=slow).json()["id"] for _ in range(2)]
        serving.until(lambda: server.scheduler.running)
        file.unlink()
        os.kill(server.engine.pids[0], signal.SIGKILL)
        serving.until(lambda: server.engine.state == "failed")
        restarts = server.engine.restarts
        assert "missing" in client.get("/ready").text
        refused = client.post("/v1/videos/sync", files=slow)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")
        assert "missing" in refused.json()["error"]["message"]
        serving.until(lambda: [client.get(f"/v1/videos/{job}").json()["status"] for job in jobs] == ["queued"] * 2)
        time.sleep(1.5)
        assert server.engine.restarts == restarts


def test_before_the_model_is_loaded_requests_are_told_to_come_back(settings):
    with serving.running(settings("images"), wait=False) as server:
        answer = httpx2.post(server.url + PATH, json=ONE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
        assert httpx2.get(server.url + "/ready").status_code == 503


def test_an_idle_server_and_its_engine_use_no_processor(client):
    def used():
        pid = client.server.engine.pids[0]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        engine_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return time.process_time() + engine_s

    before = used()
    time.sleep(1.5)
    assert used() - before < 0.1


SERVER = """
import pathlib, sys, time, serving
from quantkit_runtime.server.settings import Settings
with serving.running(Settings({"images": serving.spec("images")}, port=0)) as server:
    print(*server.engine.pids, flush=True)
    time.sleep(60)
"""


def test_an_engine_ends_with_a_server_that_is_killed():
    environment = os.environ | {"PYTHONPATH": str(Path(serving.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as server:
        engine = Path("/proc", server.stdout.readline().strip())
        assert engine.exists()
        server.kill()
    serving.until(lambda: not engine.exists() or "Z" in (engine / "stat").read_text().rpartition(")")[2][:3], 10)


def test_restarts_leave_no_files_and_threads_behind(client):
    def held():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    counts = []
    for _ in range(4):
        os.kill(client.server.engine.pids[0], signal.SIGKILL)
        serving.until(lambda: not client.server.engine.is_ready)
        serving.until(lambda: client.server.engine.is_ready)
        assert client.post(PATH, json=ONE).status_code == 200
        counts.append(held())
    assert counts[-1] <= counts[0]
