"""The page at ``/`` in a headless Chromium, and chats through the openai client, against real models."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import wave

import pytest
from browser import Browser, find_chromium
from served import served
from tiny_omni import build_qwen2_5_omni

import quantkit.demo

CHROMIUM = find_chromium()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    demo = quantkit.demo.path()
    models = {"one": demo, "two": demo, "omni": build_qwen2_5_omni(folder / "omni")}
    with served(models, folder, reference="two") as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install the package chromium to test the page")
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser, url):
    browser.errors.clear()
    browser.open(f"{url}/")
    browser.wait_for("document.querySelectorAll('#fields input').length > 0")
    yield browser
    assert browser.errors == []


def _send(page, **values):
    lines = "".join(f"document.getElementById({name!r}).value = {value!r};" for name, value in values.items())
    page.evaluate(f"(() => {{ {lines} document.getElementById('form').requestSubmit(); }})()")


def test_two_models_draw_side_by_side_with_the_same_seed_and_their_difference_is_shown(page):
    seen = (
        "window.steps = new Set(); new MutationObserver(() => document.querySelectorAll('figure:first-child small')"
    )
    seen += ".forEach(note => window.steps.add(note.textContent))).observe(document.getElementById('results'), "
    page.evaluate(seen + "{ childList: true, subtree: true, characterData: true })")
    _send(page, prompt="a red circle", width="64", height="64", num_inference_steps="4")
    page.wait_for("document.querySelectorAll('#results figure').length === 3")
    steps = page.evaluate("[...window.steps].filter(text => text.startsWith('step'))")
    assert steps == [f"step {number} of 4" for number in range(1, 5)]
    titles = page.evaluate("[...document.querySelectorAll('figcaption div')].map(node => node.textContent)")
    assert titles == ["onecandidate", "tworeference", "Difference8 times"]
    notes = page.evaluate("[...document.querySelectorAll('figcaption small')].map(node => node.textContent)")
    assert notes[2] == "identical"  # both are the same model
    assert notes[0].partition("seed")[2] == notes[1].partition("seed")[2] != ""
    assert page.evaluate("document.querySelector('#results img').naturalWidth") == 64


def test_what_is_wrong_is_said_with_the_field_and_limit(page):
    _send(page, prompt="a red circle", width="64", height="64", num_inference_steps="100000")
    page.wait_for("document.querySelector('.note.bad') !== null")
    assert "num_inference_steps: at most" in page.evaluate("document.querySelector('.note.bad').textContent")


def test_a_drawing_can_be_stopped(page):
    _send(page, prompt="a red circle", width="64", height="64", num_inference_steps="150")
    page.wait_for("document.querySelector('figcaption small')?.textContent.startsWith('step')")
    page.evaluate("document.getElementById('stop').click()")
    page.wait_for("document.getElementById('stop').disabled")
    assert page.evaluate("document.querySelector('figcaption small').textContent") == "stopped"


def test_a_chat_goes_on_and_speaks(page):
    page.evaluate("[...document.querySelectorAll('nav button')].find(tab => tab.textContent === 'Chat').click()")
    _send(page, prompt="Hello", max_tokens="8", temperature="0")
    page.wait_for("/^8 tokens/.test(document.querySelector('figcaption small')?.textContent)")
    page.evaluate("document.getElementById('speak').checked = true")
    _send(page, prompt="And now?", max_tokens="4", temperature="0")
    page.wait_for("document.querySelector('.turn audio') !== null")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 4
    assert page.evaluate("document.querySelector('.turn.user').textContent") == "Hello"


def test_nothing_on_the_page_comes_from_elsewhere(page):
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)")
    assert names
    assert set(names) == {page.evaluate("location.host")}


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def _ask(client, text, **changes):
    values = {"model": "omni", "max_tokens": 10, "temperature": 0, **changes}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **values)


def test_streamed_pieces_are_the_whole_answer_and_usage_comes_last(client):
    whole = _ask(client, "Hello", temperature=1, seed=3, max_tokens=20)
    pieces = list(
        _ask(
            client,
            "Hello",
            temperature=1,
            seed=3,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len(pieces) > 8


def test_several_chats_at_once_are_answered_as_one_alone(client):
    # Sampled answers have their own random numbers; greedy ones of bf16 may differ in a rounding.
    texts = [f"Say {number}" for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda text: _ask(client, text), texts))
    assert [one.usage.completion_tokens for one in answers] == [10] * 6
    assert answers[0].choices[0].message.content[:1] == _ask(client, texts[0]).choices[0].message.content[:1]


def test_an_answer_can_be_heard(client):
    answer = _ask(client, "Hello", modalities=["text", "audio"], audio={"voice": "Chelsie", "format": "wav"})
    sound = answer.choices[0].message.audio
    assert sound.transcript == _ask(client, "Hello").choices[0].message.content
    with wave.open(io.BytesIO(base64.b64decode(sound.data))) as file:
        assert (file.getframerate(), file.getnchannels()) == (24_000, 1)
        assert file.getnframes() > 0


@pytest.mark.parametrize("seed", [0, 16])  # with 16 this talker's first choice would be the end
def test_a_text_is_read_aloud(client, seed):
    speech = client.audio.speech.create(
        model="omni", input="Good day", voice="Chelsie", response_format="wav", extra_body={"seed": seed}
    )
    with wave.open(io.BytesIO(speech.read())) as file:
        assert file.getnframes() > 0
