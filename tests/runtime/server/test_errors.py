"""Every error that an operation documents is answered by it; the fixture ``serve`` looks for any other one."""

import asyncio
import errno
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import serving

from quantkit_runtime.server.png import encode_png

PICTURE = encode_png(np.zeros((16, 16, 3), np.uint8))
KEY = "correct-horse-battery"
JSON = {
    "/v1/images/generations": lambda text: {"prompt": text},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/audio/speech": lambda text: {"input": text},
}
KINDS = ("images", "editor", "videos", "chat")
# Errors of the whole server, by the settings that bring them about.
SETTINGS = {429: {"max_queue": 0, "max_jobs": 0}, 504: {"request_timeout_s": 0.0}}
PROMPTS = {500: "fail", 507: "oom"}


def documented():
    """Yield every operation with every error that it documents."""
    from quantkit_runtime.server.app import create_app
    from quantkit_runtime.server.settings import Settings

    app = create_app(Settings({kind: serving.spec(kind) for kind in KINDS}, api_keys=(KEY,)))
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            for status in operation["responses"]:
                if int(status) >= 400:
                    yield method.upper(), path, int(status)


def ask(client, method, path, text="a cat", **changes):
    """Send a request that is right but for the changes."""
    fields = changes.pop("fields", {})
    if path in JSON:
        changes = {"json": {**JSON[path](text), **fields}, **changes}
    elif method == "POST":
        picture = {"image": ("a.png", PICTURE)} if path == "/v1/images/edits" else {}
        model = {"model": "editor"} if picture else {}
        form = {name: (None, value) for name, value in {"prompt": text, **model, **fields}.items()}
        changes = {"files": form | picture, **changes}
    elif fields:
        changes["params"] = fields
    return client.request(method, path, **changes)


def provoke(client, method, path, status):
    """Send what is answered with an error, where no other settings are needed for it."""
    job = None
    if "{video_id}" in path:
        job = ask(client, "POST", "/v1/videos", "fail").json()["id"]
    place = path.format(video_id=job, name="images")
    if status == 400:
        wrong = {"limit": "0", "variant": "x"} if method == "GET" else {"colour": "red"}
        return ask(client, method, place, fields=wrong)
    if status == 401:
        return ask(client, method, place, headers={"Authorization": "Bearer wrong"})
    if status == 403:
        return ask(client, method, place, headers={"Origin": "http://elsewhere"})
    if status == 404:
        fields = {"model": "other"} if method == "POST" else {}
        return ask(client, method, path.format(video_id="other", name="other"), fields=fields)
    if status == 409 and method == "GET":
        return ask(client, method, place)
    if status == 409:
        once = {"Idempotency-Key": "once"}
        ask(client, method, place, "one", headers=once)
        return ask(client, method, place, "another", headers=once)
    if status == 413:
        return ask(client, method, place, "x" * 200_000)
    if status == 415:
        kind = {"Content-Type": "text/plain"}
        return client.request(method, place, content="a cat", headers=kind)
    return ask(client, method, place, PROMPTS[status])


@pytest.mark.parametrize(("method", "path", "status"), list(documented()))
def test_a_documented_error_is_answered(serve, loading, method, path, status):
    if status == 503:
        answer = ask(loading, method, path.format(video_id="x"))
    elif (method, path, status) == ("GET", "/v1/videos", 404):
        answer = authorized(serve("images", api_keys=(KEY,))).get(path)
    elif (method, path, status) == ("POST", "/v1/videos", 507):
        client = authorized(serve(*KINDS, api_keys=(KEY,), max_jobs=1000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client.server.context.running_jobs._store, "create", full_disk)
            answer = ask(client, method, path)
    elif status in SETTINGS:
        answer = ask(authorized(serve(*KINDS, api_keys=(KEY,), **SETTINGS[status])), method, path)
    else:
        answer = provoke(authorized(serve(*KINDS, api_keys=(KEY,), max_jobs=1000)), method, path, status)
    assert answer.status_code == status, answer.text


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_replica_of_a_cluster_does_not_document_the_jobs_that_it_refuses(settings, monkeypatch):
    from quantkit_runtime.server import cluster

    monkeypatch.setattr(cluster, "set_up_logging", lambda *_arguments, **_options: None)
    replica = cluster.Replica(settings("videos"))
    paths = replica.__serve_build_asgi_app__().openapi()["paths"]
    assert [path for path in paths if "videos" in path] == ["/v1/videos/sync"]
    replica._folder.cleanup()  # what it keeps goes with it


def test_a_replica_that_refuses_a_job_has_asked_for_the_key_before(settings, monkeypatch):
    from quantkit_runtime.server import cluster

    monkeypatch.setattr(cluster, "set_up_logging", lambda *_arguments, **_options: None)
    replica = cluster.Replica(settings("videos", api_keys=(KEY,)))

    async def ask(path, headers):
        transport = httpx2.ASGITransport(app=replica.__serve_build_asgi_app__())
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path, headers=headers)

    key = {"Authorization": f"Bearer {KEY}"}
    asked = [("/v1/videos", {}), ("/v1/videos", key), ("/v1/videos/x", key), ("/v1/videosx", key)]
    answers = [asyncio.run(ask(*one)) for one in asked]
    assert [answer.status_code for answer in answers] == [401, 501, 501, 404]
    assert all("x-request-id" in answer.headers for answer in answers)
    replica._folder.cleanup()


def authorized(client):
    client.headers["Authorization"] = f"Bearer {KEY}"
    return client


@pytest.fixture(scope="module")
def loading(settings):
    """A client of a server whose models are being loaded."""
    choice = settings(*KINDS)
    slow = {name: replace(spec, loader="serving:load_slowly") for name, spec in choice.models.items()}
    with (
        pytest.MonkeyPatch.context() as patch,
        serving.running(replace(choice, models=slow), wait=False) as server,
        httpx2.Client(base_url=server.url) as client,
    ):
        patch.setattr("quantkit_runtime.server.supervisor._STOP_S", 0.5)  # no engine hears that it should end
        yield client
