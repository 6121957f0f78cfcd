"""/v1/images: what comes out, and what a caller is told of a mistake."""

import base64
import io
import json

import openai
import pytest
from PIL import Image
from serving import IMAGES as PATH
from serving import pixels_of


@pytest.fixture
def client(serve):
    return serve("images")


def test_pictures_come_in_the_order_of_their_seeds(client):
    done = client.post(PATH, json={"prompt": "a cat", "n": 3, "seed": 7, "size": "96x64"})
    assert done.status_code == 200, done.text
    body = done.json()
    assert [item["seed"] for item in body["data"]] == [7, 8, 9]
    assert [pixels_of(done, index)[0, 0, 0] for index in range(3)] == [7, 8, 9]
    assert pixels_of(done).shape == (64, 96, 3)
    assert body["size"] == "96x64"
    assert done.headers["x-model"] == "images"
    assert float(done.headers["x-inference-time-s"]) > 0


def test_without_a_seed_one_is_drawn_and_told(client):
    seeds = {client.post(PATH, json={"prompt": "a cat"}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_the_output_format_is_as_asked(client, form, magic):
    body = client.post(PATH, json={"prompt": "a cat", "output_format": form}).json()
    assert base64.b64decode(body["data"][0]["b64_json"]).startswith(magic)


def test_a_stream_tells_of_each_step_and_ends_with_each_picture(client):
    asked = {"prompt": "a cat", "num_inference_steps": 3, "n": 2, "seed": 7}
    with client.stream("POST", PATH, json={**asked, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [(event.get("step"), event.get("steps")) for event in events[:-2]] == [(1, 3), (2, 3), (3, 3)]
    whole = client.post(PATH, json=asked).json()
    for event, picture in zip(events[-2:], whole["data"], strict=True):
        assert event.pop("created_at") > 0
        common = {"type": "image_generation.completed", "output_format": "png", "size": whole["size"]}
        assert event == {**picture, **common}


def test_the_openai_client_finds_the_picture_of_a_stream(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        *_, last = sdk.images.generate(model="images", prompt="a cat", stream=True)
    assert base64.b64decode(last.b64_json).startswith(b"\x89PNG")
    assert (last.type, last.output_format, last.size) == ("image_generation.completed", "png", "64x64")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"sise": "64x64"}, "sise", "unknown field"),
        ({"size": "65x64"}, "size", "multiples of 16, the nearest is 64x64"),
        ({"size": "1024x1024"}, "size", "at most 65536 pixels"),
        ({"size": "big"}, "size", "match"),
        ({"size": "64x64", "width": 64, "height": 64}, "size", "either"),
        ({"width": 64}, "height", "goes with width"),
        ({"num_inference_steps": 51}, "num_inference_steps", "at most 50, not 51"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1, not 0"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "  "}, "prompt", "match"),
        ({"prompt": "x" * 501}, "prompt", "at most 500 characters"),
        ({"seed": -1}, "seed", "greater than or equal to 0, not -1"),
        ({"n": 11}, "n", "less than or equal to 10, not 11"),
        ({"guidance_scale": 1e9}, "guidance_scale", "less than or equal to 100"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale", "FakePipeline does not take it"),
        ({"response_format": "url"}, "response_format", "'b64_json'"),
    ],
)
def test_a_mistake_is_named_with_its_field_and_limit(client, change, param, words):
    done = client.post(PATH, json={"prompt": "a cat", **change})
    assert done.status_code == 400
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert words in error["message"]


def test_the_models_own_number_of_steps_is_within_the_limit_too(serve):
    with serve("images", max_steps=1).stream("POST", PATH, json={"prompt": "a cat", "stream": True}) as answer:
        steps = [json.loads(line[6:]).get("steps") for line in answer.iter_lines() if line.startswith("data: ")]
    assert steps == [1, None]  # its default is 2


def test_a_missing_prompt_is_named(client):
    assert client.post(PATH, json={}).json()["error"]["code"] == "missing_required_parameter"


def test_an_unknown_model_is_404(client):
    done = client.post(PATH, json={"prompt": "a cat", "model": "nonsense"})
    assert (done.status_code, done.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_value"),
        (b"\xff\xfe", "application/json", 400, None),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_content_type"),
        (b"{}", "text/plain", 415, "unsupported_content_type"),
        (b"x" * 200_001, "application/json", 413, "body_too_large"),
    ],
)
def test_a_body_that_is_no_such_json_is_refused(client, content, kind, status, code):
    done = client.post(PATH, content=content, headers={"Content-Type": kind})
    assert done.status_code == status
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code


def test_a_body_whose_length_is_not_told_is_cut_off(client):
    pieces = (b"x" * 50_000 for _ in range(10))
    done = client.post(PATH, content=pieces, headers={"Content-Type": "application/json"})
    assert (done.status_code, done.json()["error"]["code"]) == (413, "body_too_large")


def test_what_the_model_refuses_is_the_callers_mistake(client):
    error = client.post(PATH, json={"prompt": "refuse"})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "prompt")


def test_other_kinds_of_requests_are_refused(client):
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "unsupported_model")
    video = client.post("/v1/videos/sync", files={"prompt": (None, "x")})
    assert video.json()["error"]["code"] == "unsupported_model"
    assert client.get("/v1/videos").status_code == 404
    edit = client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": png((1, 2, 3))})
    assert (edit.status_code, edit.json()["error"]["param"]) == (400, "model")
    assert "cannot edit" in edit.json()["error"]["message"]


def png(colour, size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_edit_starts_from_the_picture(serve):
    client = serve("editor")
    done = client.post("/v1/images/edits", data={"prompt": "x", "seed": 5}, files={"image": png((1, 2, 99))})
    assert done.status_code == 200, done.text
    assert list(pixels_of(done)[0, 0]) == [5, 1, 99]
    alone = client.post(PATH, json={"prompt": "x"})
    assert (alone.status_code, "use /v1/images/edits" in alone.text) == (400, True)


@pytest.mark.parametrize(
    ("upload", "status", "code"),
    [
        (b"no picture", 400, "invalid_image"),
        (png((0, 0, 0))[:45], 400, "invalid_image"),
        (b"", 400, "invalid_value"),
        (png((0, 0, 0), (1024, 512)), 413, "image_too_large"),
        (b"\x89PNG" + b"x" * 100_001, 413, "upload_too_large"),
    ],
)
def test_an_upload_that_is_no_picture_within_limits_is_refused(serve, upload, status, code):
    done = serve("editor").post("/v1/images/edits", data={"prompt": "x"}, files={"image": upload})
    assert (done.status_code, done.json()["error"]["code"]) == (status, code)
    assert done.json()["error"]["param"] == "image"


def test_openapi_has_every_route_and_the_error_shape(client):
    document = client.get("/openapi.json").json()
    assert {PATH, "/v1/videos/sync", "/v1/chat/completions", "/v1/audio/speech"} <= set(document["paths"])
    answers = document["paths"][PATH]["post"]["responses"]
    assert "422" not in answers  # never sent
    assert answers["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")


def test_the_service_tells_of_itself(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "images"
    assert client.get("/v1/models/images").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/ready").json() == {"status": "ready", "models": {"images": "ready"}}
    assert "version" in client.get("/version").json()
    assert client.get("/nonsense").json()["error"]["code"] == "not_found"
    assert client.delete(PATH).json()["error"]["code"] == "method_not_allowed"
    text = client.get("/metrics").text
    for name in ("quantkit_queue_depth", "quantkit_queue_wait_seconds_count", "quantkit_step_seconds_count",
                 'quantkit_requests_total{model="images",outcome="ok"}', "quantkit_peak_memory_bytes"):  # fmt: skip
        assert name in text
