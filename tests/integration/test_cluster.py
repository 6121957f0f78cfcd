"""The app on a Ray cluster of this machine: two replicas, one of them killed under load."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from PIL import Image
from served import _free_port

pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'quantkit-runtime[ray]'")

_RUN = """
import sys, json
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.run import serve
from quantkit_runtime.server.settings import Cluster, Settings
spec = ModelSpec("stub", loader=sys.argv[2], warm_up=False)
copies = int(sys.argv[3])
cluster = Cluster(min_replicas=copies, max_replicas=copies, cpus_per_replica=0.5)
serve(Settings(models={"stub": spec}, port=int(sys.argv[1]), cluster=cluster, log_format="text", drain_s=2))
"""


def _start(port, log, loader="stub_model:load", copies=2):
    tests = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, str(port), loader, str(copies)],
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    port = _free_port()
    with (folder / "log").open("wb") as log:
        process = _start(port, log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: _answers(f"{url}/ready"), process, folder)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def _wait(ready, process, folder=None, timeout_s=90):
    end = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, (folder / "log").read_text() if folder else "ended"
        assert time.monotonic() < end, (folder / "log").read_text() if folder else "too late"
        time.sleep(0.2)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _draw(url, steps=2):
    """Return the grey of a picture, trying again as an openai client does where a replica was lost."""
    body = json.dumps({"prompt": "x", "seed": 1, "num_inference_steps": steps}).encode()
    for _ in range(6):
        request = urllib.request.Request(
            f"{url}/v1/images/generations", body, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                data = json.load(answer)["data"]
                return Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"]))).getpixel((0, 0))[0]
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            time.sleep(0.5)
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.5)
    raise AssertionError("lost")


def _replicas(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:quantkit" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_replica_loses_no_request_and_comes_back(cluster):
    url, process = cluster
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        before = set(pool.map(lambda _: _draw(url), range(24)))
        assert len(before) == 2  # both replicas draw
        replicas = _replicas(process)
        assert len(replicas) == 2
        running = [pool.submit(_draw, url, 4) for _ in range(40)]
        time.sleep(0.5)
        os.kill(replicas[0].pid, signal.SIGKILL)
        answered = [one.result() for one in running]
    assert len(answered) == 40
    _wait(lambda: len(_replicas(process)) == 2, process)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        _wait(lambda: len(set(pool.map(lambda _: _draw(url), range(16)))) == 2, process)


@pytest.mark.slow
def test_progress_streams_through_the_cluster(cluster):
    url, _ = cluster
    body = json.dumps({"prompt": "x", "num_inference_steps": 3, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        arrivals = [(time.monotonic(), line) for line in answer if line.startswith(b"data: ")]
    events = [json.loads(line[6:]) for _, line in arrivals]
    assert [event.get("step") for event in events] == [1, 2, 3, None]
    assert events[-1]["b64_json"]
    assert arrivals[2][0] - arrivals[0][0] > 0.05  # as they happen, not all at the end


@pytest.mark.slow
def test_a_cluster_refuses_video_jobs(cluster):
    url, _ = cluster
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/v1/videos/some-id", timeout=10)
    assert refused.value.code == 501
    assert "/v1/videos/sync" in json.load(refused.value)["error"]["message"]


def test_a_replica_asks_for_the_accelerators_of_its_ranks_on_one_node_and_copies_follow_the_load():
    from quantkit_runtime.server.cluster import bind
    from quantkit_runtime.server.protocol import ModelSpec
    from quantkit_runtime.server.settings import Cluster, Limits, Settings

    spec = ModelSpec("model", device="cuda", cfg_parallel=2)
    cluster = Cluster(min_replicas=1, max_replicas=4, target_requests=3, cpus_per_replica=2)
    bound = bind(Settings(models={"model": spec}, cluster=cluster, limits=Limits(max_queue=9)))
    deployment = bound._bound_deployment
    config = deployment._deployment_config
    assert deployment._replica_config.placement_group_bundles == [{"CPU": 2.0, "GPU": 2.0}]
    assert deployment._replica_config.placement_group_strategy == "STRICT_PACK"
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 3)
    assert config.max_queued_requests == 9


@pytest.mark.slow
def test_a_cluster_that_is_told_to_stop_ends_well(cluster):
    _, process = cluster  # the last test that uses it
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_start(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = _start(_free_port(), log, "serving:load_broken", copies=1)
    try:
        assert process.wait(120) == 1
    finally:
        process.kill()
    told = (tmp_path / "log").read_text()
    assert "could not load a model" in told
    assert "server: ready" not in told
