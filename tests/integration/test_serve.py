"""The server with real pipelines: it answers what the pipeline itself draws, whatever happens to its engine."""

import base64
import gzip
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import av
import httpx2
import numpy as np
import openai
import pytest
import serving
import torch
from PIL import Image

from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Limits, Settings
from quantkit_runtime.server.supervisor import Patience

DRAW = {"size": "32x32", "num_inference_steps": 3, "max_sequence_length": 16}
PATIENCE = Patience(ping_s=0.5, silence_s=3.0)


@pytest.fixture
def collector():
    """A collector of traces: its address, and all that was sent to it."""
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join()


@contextmanager
def started(*arguments, **environment):
    """Run ``python -m quantkit_runtime.server``; yields its process and address."""
    command = [
        sys.executable,
        "-m",
        "quantkit_runtime.server",
        *map(str, arguments),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            url, lines = None, []
            for line in process.stderr:
                lines.append(line)
                record = json.loads(line) if line.startswith("{") else {}
                url = record.get("url", url)
                if record.get("message") == "ready":
                    break
            assert url is not None, "".join(lines)
            reader = threading.Thread(target=lambda: lines.extend(process.stderr))
            reader.start()
            yield process, url
        finally:
            process.terminate()
            process.wait(60)
            reader.join()


def decoded(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))), dtype=int)


@pytest.fixture(scope="module")
def draw(rtn_checkpoint):
    """Draw with the packed pipeline in this process."""
    from quantkit_runtime import load_pipeline

    pipeline = load_pipeline(rtn_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def run(prompt, seed):
        with torch.inference_mode():
            frames = pipeline(
                prompt, width=32, height=32, num_inference_steps=3, max_sequence_length=16, output_type="np",
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]  # fmt: skip
        return (frames * 255).round().astype(int)

    return run


def test_a_packed_model_draws_through_the_openai_client_and_sigterm_drains(rtn_checkpoint, draw, collector):
    endpoint, traces = collector
    options = (rtn_checkpoint, "--served-model-name", "packed", "--dtype", "float32")
    with started(*options, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            extra = {key: value for key, value in DRAW.items() if key != "size"}
            answer = client.images.generate(
                model="packed", prompt="a red circle", n=2, size="32x32", extra_body={**extra, "seed": 4}
            )
            # Together they may round otherwise than alone, by one level of 255.
            for index, item in enumerate(answer.data):
                assert np.abs(decoded(item) - draw("a red circle", 4 + index)).max() <= 1
            assert [model.id for model in client.models.list()] == ["packed"]
            with pytest.raises(openai.NotFoundError, match="not served"):
                client.images.generate(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.generate(prompt="x", size="33x33")
            assert (caught.value.param, caught.value.type) == ("size", "invalid_request_error")
            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(
                    client.images.generate,
                    prompt="last",
                    size="32x32",
                    extra_body={**extra, "num_inference_steps": 60},
                )
                metrics = "quantkit_queue_wait_seconds_count"
                before = httpx2.get(f"{url}/metrics").text
                serving.until(lambda: httpx2.get(f"{url}/metrics").text.count(metrics) and
                              httpx2.get(f"{url}/metrics").text != before)  # fmt: skip
                process.send_signal(signal.SIGTERM)
                assert len(last.result().data) == 1
        assert process.wait(60) == 0
    spans = b"".join(gzip.decompress(sent) if sent[:2] == b"\x1f\x8b" else sent for sent in traces)
    for name in (b"POST /v1/images/generations", b"queue", b"generate"):
        assert name in spans
    assert b"a red circle" not in spans


def settings_of(folder, tmp_path, **changes):
    spec = ModelSpec(path=str(folder), dtype="float32", **changes)
    limits = Limits(max_queue=256, max_pixels=1024 * 1024)
    return Settings(
        models={"model": spec}, port=0, state_dir=tmp_path, limits=limits, patience=PATIENCE, log_format="text"
    )


def test_glm_image_edits_a_picture_through_the_openai_client(tiny_model, tmp_path):
    def picture(colour):
        file = io.BytesIO()
        Image.new("RGB", (96, 64), colour).save(file, "PNG")
        return file.getvalue()

    with (
        serving.running(settings_of(tiny_model("glm_image"), tmp_path)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def edit(colour, seed, n=1):
            extra = {"num_inference_steps": 2, "max_sequence_length": 16, "seed": seed}
            answer = client.images.edit(
                image=picture(colour), prompt="a red circle", size="64x64", n=n, extra_body=extra
            )
            return [decoded(item) for item in answer.data]

        first, second = edit("white", 3, n=2)
        assert first.shape == (64, 64, 3)
        assert np.array_equal(edit("white", 4)[0], second)  # picture i has the seed of the request and i
        assert np.abs(edit("blue", 3)[0] - first).max() > 1


@pytest.fixture(scope="module")
def wan(tiny_model, tmp_path_factory):
    """A Wan pipeline whose guidance runs on two ranks."""
    choice = settings_of(tiny_model("wan_t2v"), tmp_path_factory.mktemp("wan"), cfg_parallel=2)
    with serving.running(choice) as server:
        yield server


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.mark.multi_rank
def test_the_published_curl_line_gives_a_video(wan, tmp_path):
    assert shutil.which("curl"), "needs curl"
    # As users of other servers type it, the size of the model apart.
    line = f"""curl -sS -X POST "{wan.url}/v1/videos/sync" \
        -F 'prompt=Cherry blossoms swaying gently in the breeze, cinematic motion' \
        -F 'width=64' -F 'height=32' -F 'num_frames=48' \
        -F 'num_inference_steps=4' -F 'guidance_scale=5.0' \
        --output t2v_output.mp4"""
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, timeout=300)
    frames = frames_of((tmp_path / "t2v_output.mp4").read_bytes())
    assert frames.shape == (49, 32, 64, 3)  # Wan draws 4 n + 1 frames


@pytest.mark.multi_rank
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_job_on_two_ranks_draws_what_one_rank_draws(wan, tiny_model):
    from quantkit_runtime import load_pipeline
    from quantkit_runtime.server.media import encode_mp4

    with openai.OpenAI(base_url=f"{wan.url}/v1", api_key="none") as client:
        job = client.videos.create(
            prompt="a cat", size="32x32", extra_body={"num_frames": 5, "num_inference_steps": 4, "seed": 3}
        )
        serving.until(lambda: client.videos.retrieve(job.id).status in ("completed", "failed"), 120)
        video = client.videos.download_content(job.id).read()
        assert [found.id for found in client.videos.list()] == [job.id]
        assert client.videos.delete(job.id).deleted
    pipeline = load_pipeline(tiny_model("wan_t2v"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        frames = pipeline(
            "a cat", width=32, height=32, num_frames=5, num_inference_steps=4, output_type="np",
            generator=torch.Generator("cpu").manual_seed(3),
        ).frames[0]  # fmt: skip
    alone = encode_mp4((frames.clip(0, 1) * 255).round().astype(np.uint8), 16)
    assert np.abs(frames_of(video) - frames_of(alone)).max() <= 2


@pytest.mark.multi_rank
def test_a_request_without_guidance_is_told_to_turn_it_on(wan):
    form = {"prompt": "x", "size": "32x32", "num_frames": "5", "num_inference_steps": "2", "guidance_scale": "1"}
    answer = httpx2.post(
        f"{wan.url}/v1/videos/sync", files={key: (None, value) for key, value in form.items()}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guidance_scale")
    assert answer.json()["error"]["message"].startswith("guidance is off")
