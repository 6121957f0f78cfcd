"""Who may call, what is fetched, and what is logged."""

import contextlib
import io
import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import httpx2
import numpy as np
import pytest
import serving

from quantkit_runtime.errors import BackendUnavailableError
from quantkit_runtime.server import remote
from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.logs import set_up_logging
from quantkit_runtime.server.options import parse
from quantkit_runtime.server.png import encode_png
from quantkit_runtime.server.settings import SettingsError, is_loopback, read_api_keys

KEY = "correct-horse-battery"
ONE = {"prompt": "a cat"}


@pytest.fixture
def locked(serve):
    return serve("images", api_keys=(KEY, "another"))


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": KEY}, bearer(KEY + "x")])
def test_without_the_right_key_nothing_but_the_probes_answers(locked, headers):
    for method, path in (
        ("POST", serving.IMAGES),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ):
        answer = locked.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert locked.get("/health").status_code == 200
    assert locked.get("/ready").status_code == 200


def test_any_of_the_keys_opens_it(locked):
    for key in (KEY, "another"):
        assert locked.post(serving.IMAGES, json=ONE, headers=bearer(key)).status_code == 200
    assert "key" in locked.get("/openapi.json", headers=bearer(KEY)).json()["components"]["securitySchemes"]


def test_other_addresses_need_a_key():
    with pytest.raises(SettingsError, match="--api-key-file"):
        parse(["model", "--host", "0.0.0.0", "--device", "cpu"])


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_API_KEY", "of-environment")
    assert read_api_keys(None) == ("of-environment",)
    file = tmp_path / "keys"
    file.write_text("# of the page\none\r\n  two \n\n")
    assert read_api_keys(file) == ("one", "two")
    assert parse(["model", "--host", "0.0.0.0", "--api-key-file", str(file), "--device", "cpu"]).api_keys == (
        "one",
        "two",
    )
    file.write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        read_api_keys(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_api_keys(tmp_path / "missing")


def test_a_line_of_several_words_is_no_key_and_is_not_repeated(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\nalice s3cret\n")
    with pytest.raises(SettingsError, match="line 2 holds white space") as caught:
        read_api_keys(file)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("QUANTKIT_API_KEY", "alice s3cret")
    with pytest.raises(SettingsError, match="QUANTKIT_API_KEY"):
        read_api_keys(None)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.2", False), ("example.com", False)],
)  # fmt: skip
def test_loopback_is_told_from_other_addresses(host, expected):
    assert is_loopback(host) is expected


def test_pages_of_other_sites_are_kept_out(serve):
    client = serve("images")
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "http://["}, {"Host": "evil.example"}):
        answer = client.post(serving.IMAGES, json=ONE, headers=headers)
        assert answer.status_code == 403, headers
    own = client.server.url
    assert client.post(serving.IMAGES, json=ONE, headers={"Origin": own}).status_code == 200


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x", "http://localhost/x", "http://[::1]/", "http://10.0.0.1/", "http://169.254.169.254/latest",
     "http://0.0.0.0/", "http://[::ffff:127.0.0.1]/", "http://2130706433/", "http://192.168.0.1:8080/"],
)  # fmt: skip
def test_private_addresses_are_never_fetched(url):
    with pytest.raises(ApiError) as caught:
        remote.fetch(url, 1000, "image")
    assert caught.value.code in ("private_address", "fetch_failed")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/x", "http://", "http://user@example.com/", "x"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(ApiError) as caught:
        remote.fetch(url, 1000, "image")
    assert caught.value.code == "invalid_url"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000, "upload_too_large"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\ncut off", "fetch_failed"),
        (b"nonsense", "fetch_failed"),
    ],
)
def test_what_is_fetched_is_bounded_and_never_redirected(monkeypatch, answer, expected):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(remote, "_public_address", lambda *_: "127.0.0.1")

        def reply():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        try:
            if isinstance(expected, bytes):
                assert remote.fetch(f"http://pictures.example:{port}/a?b", 1000, "image") == expected
            else:
                with pytest.raises(ApiError) as caught:
                    remote.fetch(f"http://pictures.example:{port}/", 1000, "image")
                assert caught.value.code == expected
        finally:
            thread.join()


@pytest.mark.parametrize("host", ["pictures.example", "[2606:4700::1111]"])
def test_a_host_is_asked_by_the_name_that_the_url_gives_it(monkeypatch, host):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        name = f"{host}:{listening.getsockname()[1]}"
        monkeypatch.setattr(remote, "_public_address", lambda *_: "127.0.0.1")
        asked = []

        def reply():
            connection, _ = listening.accept()
            with connection:
                asked.append(connection.recv(4096).decode())
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

        thread = threading.Thread(target=reply)
        thread.start()
        try:
            assert remote.fetch(f"http://{name}/a", 1000, "image") == b"abc"
        finally:
            thread.join()
    assert f"Host: {name}\r\n" in asked[0]


def test_all_urls_of_a_chat_share_one_deadline_and_keep_no_other_chat_waiting(settings, monkeypatch):
    fetched = []

    def slow(_url, _most, _param, total_s):
        fetched.append(total_s)
        time.sleep(min(0.6, total_s))
        return png

    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr("quantkit_runtime.server.conversation.fetch", slow)
    part = {"type": "image_url", "image_url": {"url": "https://pictures.example/"}}
    body = {"messages": [{"role": "user", "content": [part] * 10}]}
    with (
        serving.running(settings("chat", allow_remote_media=True, request_timeout_s=1.0)) as server,
        httpx2.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        server.loop.call_soon_threadsafe(server.loop.set_default_executor, ThreadPoolExecutor(1))
        began = time.monotonic()
        waiting = pool.submit(client.post, "/v1/chat/completions", json=body)
        serving.until(lambda: fetched)
        quick = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "one"}]})
        assert time.monotonic() - began < 0.6
        assert quick.status_code == 200
        answer = waiting.result()
        assert time.monotonic() - began < 2
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "fetch_failed")
    assert len(fetched) == 2
    assert fetched[1] < 0.5


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"]
)
def test_what_comes_in_drops_is_not_waited_for(monkeypatch, begin):
    monkeypatch.setattr(remote, "_public_address", lambda *_: "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(begin)
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        with pytest.raises(ApiError, match=r"image: pictures.example takes more than 0.3 s"):
            remote.fetch(f"http://pictures.example:{port}/", 1000, "image", 0.3)
        assert time.monotonic() - began < 2
        thread.join()


def test_log_lines_are_json_with_the_requests_id_and_no_secrets(locked):
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:]
    set_up_logging("json", stream=stream)
    try:
        answer = locked.post(
            serving.IMAGES, json={"prompt": "a private cat"}, headers={**bearer(KEY), "X-Request-Id": "mine-1"}
        )
        locked.post(serving.IMAGES, json=ONE, headers=bearer("mistyped-key"))
    finally:
        root.handlers[:] = before
    assert answer.headers["x-request-id"] == "mine-1"
    text = stream.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    mine = [line for line in lines if line.get("request_id") == "mine-1"]
    assert mine
    assert (mine[-1]["path"], mine[-1]["status"]) == (serving.IMAGES, 200)
    for secret in (KEY, "mistyped-key", "private cat"):
        assert secret not in text


def test_a_path_cannot_forge_log_lines_of_text():
    stream = io.StringIO()
    before = logging.getLogger().handlers[:]
    try:
        set_up_logging("text", stream=stream)
        path = "/v1/x\n12:00:00 INFO server: forged\x1b[31m"
        logging.getLogger("quantkit_runtime.server").warning("request", extra={"path": path, "status": 404})
    finally:
        logging.getLogger().handlers[:] = before
    [line] = stream.getvalue().splitlines()
    assert line.endswith(r"path='/v1/x\n12:00:00 INFO server: forged\x1b[31m' status=404")


def test_an_id_that_could_forge_log_lines_is_replaced(serve):
    answer = serve("images").get("/v1/models", headers={"X-Request-Id": 'a" b'})
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m", "--default", "steps"], "FIELD=VALUE"),
        (["m", "--default", "=3"], "FIELD=VALUE"),
        (["m", "--limit", "max_speed=3"], "NAME=VALUE"),
        (["m", "--limit", "max_queue=0"], "positive whole number"),
        (["m", "--limit", "max_queue=many"], "positive whole number"),
        (["m", "--port", "70000"], "--port 70000: must be between 0 and 65535"),
        (["m", "--drain", "nan"], "--drain nan: must be a number of seconds"),
        (["m", "--drain", "-1"], "--drain -1: must be a number of seconds"),
        (["m", "--engine", "ray", "--target-requests", "0"], "--target-requests 0: must be a positive number"),
    ],
)
def test_options_that_cannot_be_used_are_named(arguments, words):
    with pytest.raises(SettingsError, match=words):
        parse([*arguments, "--device", "cpu"])


def test_recorded_steps_are_refused_where_nothing_is_recorded():
    with pytest.raises(BackendUnavailableError, match="CUDA graphs need a CUDA device, not cpu; leave them out"):
        parse(["m", "--cuda-graphs", "--device", "cpu"])


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_here_is_refused_before_anything_listens(device):
    with pytest.raises(BackendUnavailableError, match=f"device '{device}': not a"):
        parse(["m", "--device", device])
    on_cluster = parse(["m", "--device", device, "--engine", "ray"])
    assert on_cluster.models["m"].device == device


def test_options_become_settings():
    settings = parse(["m", "--served-model-name", "n", "--port", "1", "--limit", "max_queue=3", "--limit",
                      "request_timeout_s=9",
                      "--default", "num_inference_steps=4", "--default", "negative_prompt=ugly",
                      "--cfg-parallel", "2", "--device", "cpu", "--compile", "--no-warm-up"])  # fmt: skip
    [(name, spec)] = settings.models.items()
    assert (name, spec.path, spec.ranks, spec.warm_up) == ("n", "m", 2, False)
    assert (spec.compile, spec.cuda_graphs) == (True, False)
    assert spec.defaults == {"num_inference_steps": 4, "negative_prompt": "ugly"}
    assert (settings.port, settings.limits.max_queue, settings.limits.request_timeout_s) == (1, 3, 9.0)


def test_a_default_that_the_model_does_not_know_ends_the_start(settings):
    from dataclasses import replace

    choice = settings("images")
    spec = replace(choice.models["images"], defaults={"true_cfg_scale": 2.0})
    with serving.running(replace(choice, models={"images": spec}), wait=False) as server:
        serving.until(lambda: server.context.started is not None and server.context.started.done())
        assert "--default true_cfg_scale" in str(server.context.started.exception())


@pytest.mark.parametrize(
    ("default", "words"),
    [
        ("temperature=hot", "valid number"),
        ("temperature=-1", "greater than or equal to 0"),
        ("top_k=-3", "greater than or equal to 1"),
        ("max_tokens=many", "valid integer"),
        ("num_inference_steps=2.5", "valid integer"),
        ("strength=2", "less than or equal to 1"),
        ("seed=5", "cannot be set"),
        ("stop=o", "cannot be set"),
        ("colour=red", "cannot be set"),
    ],
)
def test_a_default_that_no_request_could_give_is_refused_before_anything_listens(default, words):
    from quantkit_runtime.server.app import create_app

    with pytest.raises(SettingsError, match=f"--default {default.partition('=')[0]}.*{words}"):
        create_app(parse(["m", "--device", "cpu", "--default", default]))


def test_defaults_that_requests_could_give_are_taken():
    from quantkit_runtime.server.app import create_app

    given = ["temperature=1", "top_p=0.5", "num_inference_steps=4", "guidance_scale=3", "negative_prompt=ugly",
             "strength=0.5", "max_tokens=7", "fps=8"]  # fmt: skip
    create_app(parse(["m", "--device", "cpu", *(word for one in given for word in ("--default", one))]))


def test_a_port_in_use_is_a_clear_error(settings):
    from dataclasses import replace

    from quantkit_runtime.server.run import bind

    with socket.create_server(("127.0.0.1", 0)) as taken:
        choice = replace(settings("images"), port=taken.getsockname()[1])
        with pytest.raises(SettingsError, match=r"--port .* cannot be bound"):
            bind(choice)


def test_several_models_are_told_apart_by_name(serve):
    client = serve("images", "chat")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["images", "chat"]
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.json()["model"] == "chat"
    assert client.post(serving.IMAGES, json={**ONE, "model": "images"}).status_code == 200
    assert client.post(serving.IMAGES, json={**ONE, "model": "chat"}).status_code == 400
    assert isinstance(client, httpx2.Client)


def test_a_name_that_no_header_can_hold_is_told_as_in_a_url(settings):
    models = {"绘": serving.spec("images"), "视": serving.spec("videos"), "聊": serving.spec("chat")}
    messages = [{"role": "user", "content": "x"}]
    with (
        serving.running(settings(models=models)) as server,
        httpx2.Client(base_url=server.url, timeout=30) as client,
    ):
        answers = [
            client.post("/v1/images/generations", json={"model": "绘", "prompt": "x"}),
            client.post("/v1/videos/sync", files={"model": (None, "视"), "prompt": (None, "x")}),
            client.post("/v1/chat/completions", json={"model": "聊", "messages": messages}),
            client.post("/v1/audio/speech", json={"model": "聊", "input": "x"}),
        ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [unquote(answer.headers["x-model"]) for answer in answers] == ["绘", "视", "聊", "聊"]


def test_traces_that_are_asked_for_and_cannot_be_sent_are_an_error(monkeypatch):
    from quantkit_runtime.errors import MissingDependencyError
    from quantkit_runtime.server.tracing import exporting

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependencyError, match=r"quantkit-runtime\[otel\]"), exporting():
        pass
