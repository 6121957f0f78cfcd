"""/v1/videos: at once and as jobs; what becomes of jobs when the server ends."""

import dataclasses
import errno
import io
import sqlite3
import time

import av
import httpx2
import numpy as np
import pytest
import serving

from quantkit_runtime.server.job_store import JobStore
from quantkit_runtime.server.settings import SettingsError

PATH = "/v1/videos"
TTL_S = 100.0


@pytest.fixture
def client(serve):
    return serve("videos")


def form(**fields):
    """Return fields as multipart."""
    return {name: (None, str(value)) for name, value in fields.items()}


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def finished(client, identity):
    def get():
        return client.get(f"{PATH}/{identity}").json()

    serving.until(lambda: get()["status"] in ("completed", "failed"))
    return get()


def test_a_video_comes_at_once_with_what_it_took(client):
    done = client.post(f"{PATH}/sync", files=form(prompt="x", width=96, height=64, num_frames=7, fps=10, seed=200))
    assert done.status_code == 200, done.text
    assert done.headers["content-type"] == "video/mp4"
    assert {"x-request-id", "x-model", "x-inference-time-s", "x-peak-memory-mb"} <= set(done.headers)
    frames, rate = frames_of(done.content)
    assert (frames.shape, rate) == ((7, 64, 96, 3), 10)
    assert abs(frames.astype(int).mean() - 200) < 3


def test_seconds_stand_for_frames(serve):
    done = serve("videos").post(f"{PATH}/sync", files=form(prompt="x", size="64x64", seconds=0.5, fps=8))
    assert len(frames_of(done.content)[0]) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 34}, "num_frames"),
        ({"seconds": 60}, "seconds"),
        ({"seconds": 1, "num_frames": 4}, "seconds"),
        ({"size": "63x64"}, "size"),
        ({"width": "wide"}, "width"),
        ({"fps": 0}, "fps"),
        ({"prompt": ""}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"colour": "red"}, "colour"),
        ({"input_reference": "no file"}, "input_reference"),
    ],
)
@pytest.mark.parametrize("path", [PATH, f"{PATH}/sync"])
def test_a_mistake_is_named(client, path, fields, param):
    done = client.post(path, files=form(**{"prompt": "x", **fields}))
    assert (done.status_code, done.json()["error"]["param"]) == (400, param), done.text


def test_json_is_refused_where_a_form_is_needed(client):
    assert client.post(f"{PATH}/sync", json={"prompt": "x"}).status_code == 415


def test_a_job_goes_from_queued_to_completed_and_is_deleted(client):
    made = client.post(PATH, files=form(prompt="slow", seed=3, num_inference_steps=4)).json()
    assert (made["object"], made["status"], made["progress"]) == ("video", "queued", 0)
    early = client.get(f"{PATH}/{made['id']}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "video_not_completed")
    serving.until(lambda: 0 < client.get(f"{PATH}/{made['id']}").json()["progress"] < 100)
    done = finished(client, made["id"])
    assert (done["status"], done["progress"], done["seed"], done["error"]) == ("completed", 100, 3, None)
    assert done["expires_at"] > done["completed_at"] >= done["created_at"]
    content = client.get(f"{PATH}/{made['id']}/content")
    assert len(frames_of(content.content)[0]) == 5
    assert client.delete(f"{PATH}/{made['id']}").json() == {
        "id": made["id"], "object": "video.deleted", "deleted": True,
    }  # fmt: skip
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert client.request(method, f"{PATH}/{made['id']}{path}").status_code == 404


def test_a_picture_to_start_from_is_kept_with_the_job(client):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    made = client.post(PATH, data={"prompt": "x"}, files={"input_reference": buffer.getvalue()}).json()
    assert finished(client, made["id"])["status"] == "completed"
    broken = client.post(PATH, data={"prompt": "x"}, files={"input_reference": b"broken"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_image")


def test_a_job_that_the_model_fails_on_says_why(client):
    done = finished(client, client.post(PATH, files=form(prompt="oom")).json()["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "out_of_memory")


def test_jobs_are_listed_in_pages(client):
    made = [client.post(PATH, files=form(prompt=f"number {n}")).json()["id"] for n in range(3)]
    for identity in made:
        finished(client, identity)
    first = client.get(PATH, params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == [made[2], made[1]]
    assert first["has_more"]
    rest = client.get(PATH, params={"limit": 1, "after": first["last_id"]}).json()
    assert [job["id"] for job in rest["data"]] == [made[0]]
    assert client.get(PATH, params={"limit": 0}).json()["error"]["param"] == "limit"


def test_deleting_a_running_job_stops_it_at_the_next_step(client):
    made = client.post(PATH, files=form(prompt="slow", num_inference_steps=50)).json()
    serving.until(lambda: client.server.scheduler.running)
    assert client.delete(f"{PATH}/{made['id']}").status_code == 200
    serving.until(lambda: not client.server.scheduler.running, 1.0)


def test_an_idempotency_key_makes_one_job(client):
    fields, headers = form(prompt="x", seed=1), {"Idempotency-Key": "abc"}
    first = client.post(PATH, files=fields, headers=headers)
    again = client.post(PATH, files=fields, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    other = client.post(PATH, files=form(prompt="y"), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_too_many_jobs_and_too_much_storage_are_429(serve):
    client = serve("videos", max_jobs=1)
    busy = form(prompt="slow", num_inference_steps=50)
    answers = [client.post(PATH, files=busy) for _ in range(4)]
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["code"] == "queue_full"
    for answer in answers:
        if answer.status_code == 200:
            client.delete(f"{PATH}/{answer.json()['id']}")
    full = serve("videos", job_quota_bytes=1)
    finished(full, full.post(PATH, files=form(prompt="x")).json()["id"])
    refused = full.post(PATH, files=form(prompt="x"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "storage_full")


def test_a_job_that_fills_the_queue_is_found_again_by_its_key(serve):
    client = serve("videos", max_jobs=1)
    running = client.post(PATH, files=form(prompt="slow", num_inference_steps=50)).json()["id"]
    serving.until(lambda: client.get(f"{PATH}/{running}").json()["status"] == "in_progress")
    last = {"files": form(prompt="x", seed=1), "headers": {"Idempotency-Key": "last"}}
    made = client.post(PATH, **last)
    assert client.post(PATH, files=form(prompt="x")).status_code == 429
    again = client.post(PATH, **last)
    assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
    for identity in (made.json()["id"], running):
        client.delete(f"{PATH}/{identity}")


def test_a_finished_video_expires(serve):
    client = serve("videos", job_ttl_s=0.5)
    made = client.post(PATH, files=form(prompt="x")).json()
    assert finished(client, made["id"])["status"] == "completed"
    time.sleep(0.5)
    assert client.get(f"{PATH}/{made['id']}").status_code == 404
    assert client.get(PATH).json()["data"] == []


def test_jobs_go_on_when_the_store_works_again(settings, monkeypatch, caplog):
    monkeypatch.setattr("quantkit_runtime.server.jobs._RETRY_S", 0.05)
    with serving.running(settings("videos")) as server, httpx2.Client(base_url=server.url) as client:
        store = server.context.running_jobs._store
        for name in ("start_next", "complete", "fail", "requeue"):
            monkeypatch.setattr(store, name, failing_once(getattr(store, name)))
        job = client.post(PATH, files=form(prompt="x")).json()["id"]
        assert finished(client, job)["status"] == "completed"
        assert store.get(job, "").tries == 1
    assert caplog.text.count("video jobs wait: the store fails") == 2
    assert caplog.text.count("job could not be put back") == 1


def test_a_server_with_a_full_disk_ends_at_once_and_its_jobs_run_after_the_next_start(
    settings, tmp_path, monkeypatch
):
    choice = settings("videos", state_dir=tmp_path / "state", drain_s=20.0)
    with serving.running(choice) as server, httpx2.Client(base_url=server.url) as client:
        store = server.context.running_jobs._store
        monkeypatch.setattr(store, "requeue", failing_once(None))
        job = client.post(PATH, files=form(prompt="slow", num_inference_steps=40)).json()["id"]
        serving.until(lambda: server.scheduler.running)
        end = time.monotonic()
    assert time.monotonic() - end < 10
    with serving.running(choice) as server, httpx2.Client(base_url=server.url) as client:
        serving.until(lambda: client.get(f"{PATH}/{job}").json()["progress"] > 0)


def failing_once(work):
    """Return a function that fails as on a full disk before it does what it should."""
    errors = [sqlite3.OperationalError("database or disk is full")]

    def call(*arguments):
        if errors:
            raise errors.pop()
        return work(*arguments)

    return call


def test_jobs_survive_the_end_of_the_server(settings, tmp_path):
    choice = settings("videos", state_dir=tmp_path / "state")
    with serving.running(choice) as server, httpx2.Client(base_url=server.url) as client:
        done = client.post(PATH, files=form(prompt="x", seed=1)).json()["id"]
        finished(client, done)
        running = client.post(PATH, files=form(prompt="slow", seed=2, num_inference_steps=5)).json()["id"]
        waiting = client.post(PATH, files=form(prompt="x", seed=3)).json()["id"]
        serving.until(lambda: server.scheduler.running)
    with serving.running(choice) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get(f"{PATH}/{done}/content").status_code == 200
        for identity, seed in ((running, 2), (waiting, 3)):
            job = finished(client, identity)
            assert (job["status"], job["seed"]) == ("completed", seed)


def test_a_job_is_not_missing_while_the_model_loads_again(settings, tmp_path):
    choice = settings("videos", state_dir=tmp_path / "state")
    with serving.running(choice) as server:
        job = httpx2.post(server.url + PATH, files=form(prompt="x")).json()["id"]
    with serving.running(choice, wait=False) as server:
        for path in (PATH, f"{PATH}/{job}", f"{PATH}/{job}/content"):
            answer = httpx2.get(server.url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
            assert answer.headers["retry-after"] == "5"
        serving.until(server.context.started.done)


def test_a_job_that_ran_when_the_server_was_killed_runs_again_but_not_for_ever(tmp_path):
    store = JobStore(tmp_path, TTL_S)
    job, _ = store.create("", "m", {"prompt": "x"}, None, body_hash="", idempotency_key=None)
    for tries in (1, 2, 3):
        started = store.start_next("m")
        assert (started.id, started.tries) == (job.id, tries)
        store.close()  # as a killed server leaves it: in progress
        store = JobStore(tmp_path, TTL_S)
    ended = store.get(job.id, "")
    assert (ended.status, ended.error_code) == ("failed", "server_stopped")
    assert "3 times" in ended.error_message
    assert ended.expires_at == ended.completed_at + TTL_S
    store.close()


def test_files_that_no_job_owns_are_removed_at_the_start(tmp_path):
    (tmp_path / "video_stray.mp4").touch()
    (tmp_path / "notes.txt").touch()
    JobStore(tmp_path, TTL_S).close()
    assert {file.name for file in tmp_path.iterdir()} >= {"notes.txt", "jobs.sqlite"}
    assert not (tmp_path / "video_stray.mp4").exists()


def test_jobs_are_seen_by_their_owner_alone(tmp_path):
    store = JobStore(tmp_path, TTL_S)
    job, _ = store.create("key-1", "m", {}, None, body_hash="", idempotency_key="k")
    other, is_new = store.create("key-2", "m", {}, None, body_hash="", idempotency_key="k")
    assert is_new
    assert store.get(job.id, "key-2") is None
    assert not store.delete(job.id, "key-2")
    assert [found.id for found in store.list_of("key-2", 10, None, "asc")[0]] == [other.id]
    store.close()


def test_a_folder_in_use_or_of_another_version_is_refused(tmp_path):
    store = JobStore(tmp_path, TTL_S)
    with pytest.raises(SettingsError, match="another server uses it"):
        JobStore(tmp_path, TTL_S)
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(SettingsError, match="version 99"):
        JobStore(tmp_path, TTL_S)


def test_a_damaged_database_is_a_clear_error(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(SettingsError, match="move it away"):
        JobStore(tmp_path, TTL_S)


def test_a_database_that_cannot_even_be_opened_is_a_clear_error_and_leaves_the_folder(tmp_path):
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(SettingsError, match="unable to open"):
        JobStore(tmp_path, TTL_S)
    (tmp_path / "jobs.sqlite").rmdir()
    JobStore(tmp_path, TTL_S).close()


def test_what_cannot_be_kept_leaves_no_files(tmp_path, monkeypatch):
    store = JobStore(tmp_path, TTL_S)
    job, _ = store.create("", "m", {}, None, body_hash="", idempotency_key=None)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("quantkit_runtime.server.job_store.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.create("", "m", {}, b"picture", body_hash="", idempotency_key=None)
        with pytest.raises(OSError, match="No space"):
            store.complete(job.id, b"video")
    with pytest.raises(TypeError):  # which ends the transaction, once the picture is written
        store.create("", "m", {"no JSON": object()}, b"picture", body_hash="", idempotency_key=None)
    assert [file.name for file in tmp_path.iterdir() if "video_" in file.name] == []
    store.close()


def test_jobs_of_a_model_that_is_not_served_wait_for_it_and_take_no_place(settings, tmp_path, caplog):
    choice = settings("videos", state_dir=tmp_path / "state", max_jobs=1)
    store = JobStore(choice.jobs_folder(), TTL_S)
    asked = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_frames": 5, "fps": 16,
             "options": {"num_inference_steps": 2}, "negative_prompt": None}  # fmt: skip
    other, _ = store.create("", "another", asked, None, body_hash="", idempotency_key=None)
    store.close()
    with serving.running(choice) as server, httpx2.Client(base_url=server.url, timeout=30) as client:
        created = client.post(PATH, files=form(prompt="a cat", seed=2))
        assert created.status_code == 200, created.text
        serving.until(lambda: client.get(f"{PATH}/{created.json()['id']}").json()["status"] == "completed")
    [warning] = [one for one in caplog.records if "model that is not served" in one.message]
    assert (warning.model, warning.jobs) == ("another", 1)
    renamed = dataclasses.replace(choice, models={"another": choice.models["videos"]})
    with serving.running(renamed) as server, httpx2.Client(base_url=server.url, timeout=30) as client:
        serving.until(lambda: client.get(f"{PATH}/{other.id}").json()["status"] == "completed")
