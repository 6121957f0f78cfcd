"""A packed omni model on two ranks: real engine processes write and say what one rank alone does."""

import base64
import io
import os
import signal
import threading
import wave
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import serving
import torch
from tiny_omni import packed_qwen2_5_omni

from quantkit_runtime import load_model
from quantkit_runtime.errors import ParallelError
from quantkit_runtime.server.models import chat
from quantkit_runtime.server.models.chat import ChatModel
from quantkit_runtime.server.models.conversation import Reader
from quantkit_runtime.server.protocol import ChatRequest, Delta, Message, ModelSpec, TextPart
from quantkit_runtime.server.settings import Settings
from quantkit_runtime.server.supervisor import Patience

pytestmark = pytest.mark.multi_rank

TEXTS = [f"{'red ' * count}{count}" for count in range(1, 5)]
PENALTY = {"repetition_penalty": 1.5}  # keeps random weights from writing one token for ever


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed_qwen2_5_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    spec = ModelSpec(path=str(folder), dtype="float32", tensor_parallel=2)
    patience = Patience(ping_s=0.5, silence_s=10.0)
    settings = Settings({"omni": spec}, port=0, state_dir=tmp_path_factory.mktemp("state"), patience=patience)
    with serving.running(settings) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, text, **more):
    given = {"max_tokens": 24, "temperature": 0.0, "extra_body": PENALTY, **more}
    return client.chat.completions.create(model="omni", messages=[{"role": "user", "content": text}], **given)


def read(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


@pytest.fixture(scope="module")
def alone(folder):
    """What one rank writes: ``alone("red 1")``."""
    model = ChatModel(load_model(folder, dtype=torch.float32), Reader(folder))

    def write(text, tokens=24):
        messages = (Message("user", (TextPart(text),)),)
        model.admit(ChatRequest("a", messages, max_tokens=tokens, temperature=0, **PENALTY))
        events = []
        while model.active:
            events += model.step()
        return "".join(event.text for event in events if isinstance(event, Delta))

    return write


def test_chats_at_once_are_what_one_rank_writes_and_one_that_is_left_leaves_them(server, client, alone):
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        with ask(client, "left", stream=True, max_tokens=2000) as left:
            others = [pool.submit(lambda text: read(ask(client, text, stream=True)), text) for text in TEXTS]
            next(left)
        written = [one.result() for one in others]
    assert written == [alone(text) for text in TEXTS]
    assert len(set(written)) == len(TEXTS)
    serving.until(lambda: not server.scheduler.running)


def test_answers_are_spoken_one_after_the_other_while_another_is_written(client, alone):
    spoken = {"modalities": ["text", "audio"], "audio": {"voice": "Chelsie", "format": "wav"}, "max_tokens": 4}
    with ThreadPoolExecutor(3) as pool:
        heard = [pool.submit(ask, client, TEXTS[0], seed=1, **spoken) for _ in range(2)]
        written = pool.submit(ask, client, TEXTS[1])
        first, second = (one.result().choices[0].message.audio for one in heard)
    assert written.result().choices[0].message.content == alone(TEXTS[1])
    assert first.transcript == alone(TEXTS[0], 4)
    assert (second.transcript, second.data) == (first.transcript, first.data)
    with wave.open(io.BytesIO(base64.b64decode(first.data))) as file:
        assert file.getnframes() > 0


def test_a_second_rank_that_is_killed_takes_the_first_with_it_and_what_waits_is_answered(server, client, alone):
    began = threading.Event()

    def read_until_cut():
        for _ in ask(client, "cut", stream=True, max_tokens=2000):
            began.set()

    pids = server.engine.pids
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(read_until_cut)
        assert began.wait(30)
        os.kill(pids[1], signal.SIGKILL)
        assert ask(client, TEXTS[0]).choices[0].message.content == alone(TEXTS[0])
        with pytest.raises(openai.APIError, match="the engine was lost: killed by SIGKILL"):
            cut.result()
    assert not set(server.engine.pids) & set(pids)


def test_guidance_is_refused_with_what_works_instead(folder):
    with pytest.raises(
        ParallelError, match=r"^--cfg-parallel 2: .* no guidance to share; --tensor-parallel shares"
    ):
        chat.load(ModelSpec(path=str(folder), cfg_parallel=2))
