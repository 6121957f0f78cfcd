"""The OpenAPI document against the server: schemathesis sends what it allows and what it does not."""

import os
import subprocess
import sys

import pytest

# Requests per operation; another seed with each number, so that a longer run is not the same one with an end.
EXAMPLES = int(os.environ.get("QUANTKIT_FUZZ_EXAMPLES", "25"))
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def client(serve):
    client = serve("images", "editor", "videos", "chat", api_keys=(KEY,), max_jobs=1000)
    client.headers["Authorization"] = f"Bearer {KEY}"
    return client


def test_every_answer_is_as_the_openapi_says(client, tmp_path):
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{client.server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {KEY}", "--max-examples", str(EXAMPLES), "--seed", str(EXAMPLES)),
        # What goes together, such as a size and the model's multiple of it, no schema can say.
        *("--exclude-checks", "positive_data_acceptance"),
        *("--request-timeout", "20", "--continue-on-failure", "--warnings", "off", "--no-color"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout


def test_the_openapi_tells_models_and_limits(client):
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    image, video = (schemas[name]["properties"] for name in ("ImageRequestBody", "VideoForm"))
    assert image["model"]["anyOf"][0]["enum"] == ["images", "editor", "videos", "chat"]
    assert image["num_inference_steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 50}
    assert image["prompt"]["maxLength"] == 500
    assert video["num_frames"]["anyOf"][0]["maximum"] == 33
    assert schemas["ChatBody"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 64
    assert document["security"]
    assert document["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/videos", "GET, POST"), ("/v1/videos/sync", "POST"), ("/v1/videos/x", "DELETE, GET")]
)
def test_another_method_is_told_which_there_are(client, path, methods):
    done = client.patch(path)
    assert (done.status_code, done.headers["allow"]) == (405, methods)
    assert done.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("change", [{"seed": False}, {"n": "1"}, {"stream": "yes"}, {"num_inference_steps": 2.5}])
def test_numbers_and_switches_in_json_are_of_their_type(client, change):
    done = client.post("/v1/images/generations", json={"prompt": "a cat", **change})
    assert (done.status_code, done.json()["error"]["param"]) == (400, *change)


def test_half_a_surrogate_pair_is_refused_before_an_answer_would_repeat_it(client):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    done = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (done.status_code, done.json()["error"]["param"]) == (400, "messages.0.content")
