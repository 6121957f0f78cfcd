"""/v1/chat/completions and /v1/audio/speech: the HTTP side, with a model that repeats words."""

import base64
import io
import json
import os
import signal
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import serving
from PIL import Image
from pydantic import ValidationError

from quantkit_runtime.server.chat_schemas import ChatBody

PATH = "/v1/chat/completions"


@pytest.fixture
def client(serve):
    return serve("chat")


def ask(text="one two three", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def sound(seconds=0.5, rate=8000):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.zeros(int(seconds * rate), "<i2").tobytes())
    return buffer.getvalue()


def events_of(answer):
    return [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]


def test_an_answer_has_text_reason_and_usage(client):
    body = client.post(PATH, json=ask(max_tokens=2)).json()
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two ", "refusal": None, "audio": None}
    assert choice["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert client.post(PATH, json=ask()).json()["choices"][0]["finish_reason"] == "stop"


def test_a_stream_has_pieces_a_reason_usage_and_an_end(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", PATH, json=ask(**options)) as answer:
        *pieces, end = events_of(answer)
    assert end == "[DONE]"
    chunks = [json.loads(piece) for piece in pieces]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "one two three "
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * 4 + ["stop"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 6)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    with client.stream("POST", PATH, json=ask(stream=True)) as answer:
        assert not any("usage" in json.loads(piece) for piece in events_of(answer)[:-1])


def test_requests_are_answered_at_the_same_time(client):
    words = " ".join(["word"] * 20)  # 0.4 s each
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(client.post, PATH, json=ask(f"{n} {words}")) for n in range(4)]
        serving.until(lambda: client.server.scheduler.running == 4, 5.0)
        answers = [answer.result().json()["choices"][0]["message"]["content"] for answer in waiting]
    assert [answer[0] for answer in answers] == ["0", "1", "2", "3"]


def test_sound_comes_out_whole_or_in_pieces(client):
    audio = {"modalities": ["text", "audio"], "audio": {"voice": "Chelsie", "format": "wav"}}
    message = client.post(PATH, json=ask(**audio)).json()["choices"][0]["message"]
    assert message["audio"]["transcript"] == "one two three "
    with wave.open(io.BytesIO(base64.b64decode(message["audio"]["data"]))) as file:
        assert (file.getframerate(), file.getnframes()) == (24_000, 3 * 240)
    with client.stream("POST", PATH, json=ask(stream=True, **audio)) as answer:
        chunks = [json.loads(piece) for piece in events_of(answer)[:-1]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if "audio" in choice["delta"]]
    assert sum(len(base64.b64decode(delta["audio"]["data"])) for delta in deltas) == 3 * 240 * 2


def test_pictures_and_sounds_go_in(client):
    content = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": data_url("image/png", picture())}},
        # A WAV that is called MP3, as some clients do.
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "mp3"}},
        {"type": "audio_url", "audio_url": {"url": data_url("audio/wav", sound())}},
    ]
    body = client.post(PATH, json={"messages": [{"role": "user", "content": content}]}).json()
    assert body["choices"][0]["message"]["content"] == "what image audio audio "


def part(kind, **fields):
    return {"messages": [{"role": "user", "content": [{"type": kind, **fields}]}]}


def audio_part(data):
    return part("input_audio", input_audio={"data": base64.b64encode(data).decode()})


def image_part(url):
    return part("image_url", image_url={"url": url})


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (image_part("http://example.com/cat.png"), 400, "remote_media_disabled"),
        (image_part("file:///etc/passwd"), 400, "remote_media_disabled"),
        (image_part("/etc/passwd"), 400, "remote_media_disabled"),
        (image_part("data:image/png;base64,***"), 400, "invalid_base64"),
        (image_part(data_url("image/png", b"broken")), 400, "invalid_image"),
        (image_part(data_url("image/svg+xml", b"<svg/>")), 400, "invalid_image"),
        (image_part(data_url("image/png", b"x" * 100_001)), 413, "upload_too_large"),
        (audio_part(b"broken"), 400, "invalid_audio"),
        (audio_part(b"#EXTM3U\n/etc/passwd"), 400, "invalid_audio"),
        (audio_part(sound(2.5)), 413, "audio_too_long"),
        (audio_part(b"RIFF" * 20), 400, "invalid_audio"),
        (part("video_url", video_url={"url": "x"}), 400, "invalid_value"),
        (ask("x" * 501), 400, "invalid_value"),
        (ask(max_tokens=65), 400, "invalid_value"),
        (ask(max_tokens=0), 400, "invalid_value"),
        (ask(max_tokens=1, max_completion_tokens=1), 400, "invalid_value"),
        (ask(temperature=3), 400, "invalid_value"),
        (ask(n=2), 400, "invalid_value"),
        (ask(modalities=["smell"]), 400, "invalid_value"),
        (ask(audio={"voice": "Nobody"}), 400, "invalid_value"),
        (ask(tools=[]), 400, "unknown_parameter"),
        ({"messages": []}, 400, "invalid_value"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "invalid_value"),
        ({}, 400, "missing_required_parameter"),
        (ask("refuse"), 400, "invalid_value"),
        (ask("refuse", stream=True), 400, "invalid_value"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_openais_shape(client, body, status, code):
    done = client.post(PATH, json=body)
    assert (done.status_code, done.json()["error"]["code"]) == (status, code), done.text
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}


def test_a_mistake_deep_in_a_message_is_named_by_its_place(client):
    for content, param in (
        ([{"type": "image_url", "image_url": "x"}], "messages.0.content.0.image_url"),
        ([{"type": "text"}], "messages.0.content.0.text"),
        (None, "messages.0.content"),
    ):
        done = client.post(PATH, json={"messages": [{"role": "user", "content": content}]})
        assert (done.status_code, done.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("more", [{}, {"modalities": ["text", "audio"]}])
def test_an_answer_can_be_sent_back_as_the_next_turn(client, more):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        messages = [{"role": "user", "content": "one two", "name": "me"}]
        for _ in range(2):
            answer = sdk.chat.completions.create(model="chat", messages=messages, **more)
            messages += [answer.choices[0].message, {"role": "user", "content": "three"}]
        messages[1] = messages[1].model_dump()
        assert sdk.chat.completions.create(model="chat", messages=messages, **more).usage.completion_tokens == 1


def test_what_an_answer_said_stands_for_its_text():
    def said(**message):
        return ChatBody(messages=[{"role": "assistant", "content": None, **message}]).messages[0].content

    assert said(audio={"id": "a", "transcript": "aloud"}) == "aloud"
    assert said(refusal="no") == "no"
    for message in ({}, {"audio": {"id": "a"}}):
        with pytest.raises(ValidationError, match="neither"):
            said(**message)


def test_many_pictures_share_one_limit(client):
    half = image_part(data_url("image/png", picture((512, 300))))["messages"][0]["content"]
    done = client.post(PATH, json={"messages": [{"role": "user", "content": half * 2}]})
    assert (done.status_code, done.json()["error"]["param"]) == (413, "messages.0.content.1.image_url.url")


def test_a_stream_that_began_ends_with_an_error_if_the_engine_is_lost(client):
    with client.stream("POST", PATH, json=ask("one crash-late", stream=True)) as answer:
        *pieces, end = events_of(answer)
    assert end == "[DONE]"
    assert json.loads(pieces[-1])["error"]["code"] == "engine_down"  # some of it was out: not run again
    serving.until(lambda: client.get("/ready").status_code == 200)
    assert client.post(PATH, json=ask()).status_code == 200


@pytest.mark.parametrize("path", [PATH, "/v1/audio/speech"])
def test_an_answer_that_is_not_streamed_survives_the_loss_of_the_engine(client, path):
    pids = list(client.server.engine.pids)
    words = "word " * 40
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, path, json=ask(words) if path == PATH else {"input": words})
        serving.until(lambda: any(ticket.pieces for ticket in client.server.scheduler._running.values()))
        os.kill(pids[0], signal.SIGKILL)
        done = waiting.result()
    assert done.status_code == 200, done.text
    if path == PATH:
        assert done.json()["choices"][0]["message"]["content"] == words
    assert client.server.engine.pids != pids


def test_a_caller_that_leaves_a_stream_stops_its_answer(client):
    with client.stream("POST", PATH, json=ask(" ".join(["word"] * 64), stream=True)) as answer:
        next(answer.iter_lines())
    serving.until(lambda: not client.server.scheduler.running, 0.6)  # 1.3 s of words were left


@pytest.mark.parametrize(("form", "magic"), [("wav", b"RIFF"), ("flac", b"fLaC"), ("opus", b"OggS"), ("mp3", b"")])
def test_speech_comes_in_the_format_that_is_asked_for(client, form, magic):
    done = client.post("/v1/audio/speech", json={"input": "one two", "voice": "Chelsie", "response_format": form})
    assert done.status_code == 200, done.text
    assert done.content.startswith(magic)
    assert done.headers["content-type"].startswith("audio/")
    assert len(done.content) > 100


def test_a_voice_is_known_however_it_is_written(client):
    assert client.post("/v1/audio/speech", json={"input": "one", "voice": "cHELSIE"}).status_code == 200


def test_speech_checks_its_fields(client):
    for change, param in (({"voice": "Nobody"}, "voice"), ({"input": " "}, "input"), ({"speed": 2}, "speed")):
        done = client.post("/v1/audio/speech", json={"input": "one", **change})
        assert (done.status_code, done.json()["error"]["param"]) == (400, param)


def test_tokens_are_counted(client):
    client.post(PATH, json=ask())
    assert 'quantkit_tokens_total{direction="completion",model="chat"}' in client.get("/metrics").text
