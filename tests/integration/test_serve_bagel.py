"""BAGEL in an engine: a picture is drawn beside chats, and neither ends the other."""

import base64
import io
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import serving
import torch
from PIL import Image
from tiny_bagel import build_bagel

from quantkit_runtime.server.models import loader
from quantkit_runtime.server.protocol import (
    ChatRequest,
    Delta,
    Failed,
    Finished,
    ImageRequest,
    Message,
    ModelSpec,
    Progress,
    TextPart,
)
from quantkit_runtime.server.settings import Settings

TEXT = "what is on the left"
PROMPT = "draw a red circle"
TOKENS = 8
STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_bagel(tmp_path_factory.mktemp("models") / "bagel")


@pytest.fixture(scope="module")
def load(folder):
    return lambda **spec: loader.load(ModelSpec(path=str(folder), dtype="float32", **spec))


@pytest.fixture(scope="module")
def loaded(load):
    return load()


@pytest.fixture
def model(loaded):
    yield loaded
    loaded.reset()
    loaded._is_shared = False


def chat(identity="chat", **sampling):
    messages = (Message("user", (TextPart(TEXT),)),)
    return ChatRequest(identity, messages, TOKENS, **{"temperature": 0.0, **sampling})


def picture(identity="picture", seed=4):
    return ImageRequest(identity, PROMPT, (seed,), 32, 32, {"num_inference_steps": STEPS})


def run(model, *requests):
    """Run requests to their end; returns all events."""
    for request in requests:
        model.admit(request)
    events = []
    while model.active:
        events += model.step()
    return events


def text_of(events, identity="chat"):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.id == identity)


def pixels_of(events):
    [pixels] = [event.result.pixels for event in events if isinstance(event, Finished) and event.id == "picture"]
    return pixels


@pytest.fixture(scope="module")
def written(loaded):
    return text_of(run(loaded, chat()))


@pytest.fixture(scope="module")
def drawn(loaded):
    return pixels_of(run(loaded, picture()))


def test_a_token_and_a_step_take_turns_and_give_what_each_gives_alone(model, written, drawn):
    events = run(model, chat(), picture())
    kinds = [type(event) for event in events if isinstance(event, (Delta, Progress))]
    assert kinds[: 2 * STEPS] == [Delta, Progress] * STEPS
    assert text_of(events) == written
    assert np.array_equal(pixels_of(events), drawn)


@pytest.mark.parametrize(("left", "other"), [("picture", "chat"), ("chat", "picture")])
def test_one_that_is_cancelled_leaves_the_other(model, written, drawn, left, other):
    for request in (chat(), picture()):
        model.admit(request)
    before = [event for _ in range(2) for event in model.step()]
    assert {event.id for event in before} == {left, other}
    model.cancel(left)
    after = run(model)
    assert {event.id for event in after} == {other}
    if other == "chat":
        assert text_of(before + after) == written
    else:
        assert np.array_equal(pixels_of(after), drawn)
    assert np.array_equal(pixels_of(run(model, picture())), drawn)  # there is room for the next


def test_a_reset_forgets_both_and_others_are_drawn_and_written(model, written, drawn):
    for request in (chat("left"), picture("also left")):
        model.admit(request)
    model.step()
    model.reset()
    assert model.active == 0
    events = run(model, chat(), picture())
    assert (text_of(events), {event.id for event in events}) == (written, {"chat", "picture"})
    assert np.array_equal(pixels_of(events), drawn)


@pytest.fixture
def failing(model, monkeypatch):
    """Make the third step of a picture fail: ``failing(error)``."""
    draw = model._drawing.run

    def fail_with(error):
        def run_and_fail(requests, on_step):
            def after_step(step, steps):
                if step == 3:
                    raise error
                on_step(step, steps)

            return draw(requests, after_step)

        monkeypatch.setattr(model._drawing, "run", run_and_fail)

    return fail_with


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("injected"), "out_of_memory"),
        (RuntimeError("[enforce fail] can't allocate memory"), "out_of_memory"),
        (RuntimeError("injected"), "internal"),
    ],
)
def test_a_picture_that_fails_ends_alone(model, failing, written, drawn, monkeypatch, caplog, error, kind):
    failing(error)
    events = run(model, chat(), picture())
    assert [(event.id, event.kind) for event in events if isinstance(event, Failed)] == [("picture", kind)]
    assert text_of(events) == written
    assert ("drawing failed" in caplog.text) == (kind == "internal")
    *_, (drawing, _) = traceback.walk_tb(error.__traceback__)
    assert (drawing.f_locals == {}) == (kind == "out_of_memory")  # what it held is freed
    monkeypatch.undo()
    assert np.array_equal(pixels_of(run(model, picture())), drawn)


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_may_have_broken_the_device_or_left_other_ranks_waiting_ends_the_engine(model, failing, is_shared):
    model._is_shared = is_shared
    error = RuntimeError("injected") if is_shared else torch.AcceleratorError("injected")
    failing(error)
    with pytest.raises(type(error), match="injected"):
        run(model, chat(), picture())


def test_what_the_model_refuses_ends_the_picture_on_every_rank_alike(model):
    model._is_shared = True
    events = run(model, ImageRequest("picture", PROMPT, (1,), 40, 32, {"num_inference_steps": STEPS}))
    assert [(event.id, event.kind) for event in events] == [("picture", "refused")]


def test_defaults_of_the_server_reach_chats(load, written):
    model = load()
    assert text_of(run(model, chat(temperature=None, seed=1))) == written  # greedy, as by its authors
    model.set_defaults({"temperature": 2.0})
    assert text_of(run(model, chat(temperature=None, seed=1))) != written
    assert text_of(run(model, chat(temperature=0.0, seed=1))) == written
    assert model.info.defaults["temperature"] == 2.0


@pytest.mark.multi_rank
def test_two_ranks_that_share_guidance_draw_and_answer_what_one_does(folder, written, drawn, tmp_path):
    defaults = {"temperature": 0.0, "num_inference_steps": STEPS}
    spec = ModelSpec(path=str(folder), dtype="float32", cfg_parallel=2, defaults=defaults)
    with (
        serving.running(Settings({"bagel": spec}, port=0, state_dir=tmp_path)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask():
            messages = [{"role": "user", "content": TEXT}]
            answer = client.chat.completions.create(model="bagel", messages=messages, max_tokens=TOKENS)
            return answer.choices[0].message.content

        def draw():
            answer = client.images.generate(model="bagel", prompt=PROMPT, size="32x32", extra_body={"seed": 4})
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))

        pids = list(server.engine.pids)
        pictures = [pool.submit(draw) for _ in range(2)]
        answers = [pool.submit(ask) for _ in range(2)]
        assert [one.result() for one in answers] == [written] * 2
        for one in pictures:
            assert np.array_equal(one.result(), drawn[0])
        with pytest.raises(openai.BadRequestError, match="guidance is off"):
            client.images.generate(model="bagel", prompt=PROMPT, size="32x32", extra_body={"guidance_scale": 1})
        assert list(server.engine.pids) == pids
