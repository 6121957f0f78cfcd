"""Answers of many requests at once, held against what the models' own ``generate`` writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny.chat import build_chat, round_chat
from tiny_omni import build_qwen2_5_omni, build_qwen3_omni

from quantkit_runtime import load_model
from quantkit_runtime.generation.batch import Batch, write_greedily
from quantkit_runtime.generation.sampling import Sampler, SamplingParams
from quantkit_runtime.generation.text import TextStream
from quantkit_runtime.generation.writer import writer_of
from quantkit_runtime.server.models.base import RequestRefusedError
from quantkit_runtime.server.models.chat import ChatModel
from quantkit_runtime.server.models.conversation import Reader
from quantkit_runtime.server.protocol import (
    AudioPart,
    ChatRequest,
    Delta,
    ImagePart,
    Message,
    SpeechRequest,
    TextPart,
)

TOKENS = 24
PENALTY = 1.5


def _packed_chat(folder):
    return round_chat(build_chat(folder.parent / "bf16"), folder)


BUILDERS = {"qwen2.5-omni": build_qwen2_5_omni, "qwen3-omni": build_qwen3_omni, "packed-llama": _packed_chat}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = BUILDERS[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder


def _messages(folder):
    """Conversations of different lengths; of omni models some with a picture or a sound."""
    random = np.random.default_rng(0)
    picture = ImagePart(random.integers(0, 255, (56, 84, 3), dtype=np.uint8))
    sound = AudioPart(random.standard_normal(9000).astype(np.float32), 16_000)
    texts = [TextPart(f"{'red ' * count}{count}") for count in range(1, 7)]
    if "omni" in str(folder):
        return [
            (Message("user", parts),)
            for parts in (
                (texts[0],), (picture, texts[1]), (sound, texts[2]),
                (texts[3],), (sound, picture, texts[4]), (texts[5],),
            )
        ]  # fmt: skip
    return [(Message("user", (text,)),) for text in texts]


def _generate(model, reader, inputs):
    writer = getattr(model, "thinker", model)
    ends = writer.generation_config.eos_token_id
    ends = reader.tokenizer.eos_token_id if ends is None else ends
    # The penalty keeps random weights from writing one token for ever.
    written = writer.generate(
        **inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends, repetition_penalty=PENALTY
    )
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def _write(batch, all_inputs, **params):
    tokens = {str(index): [] for index in range(len(all_inputs))}
    for index, inputs in enumerate(all_inputs):
        batch.add(
            str(index),
            inputs,
            SamplingParams(**{"max_tokens": TOKENS, "temperature": 0, "repetition_penalty": PENALTY, **params}),
        )
    while len(batch):
        for piece in batch.step():
            tokens[piece.key].append(piece.token)
    return list(tokens.values())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float32, False), (torch.bfloat16, True)], ids=["batched-fp32", "exact-bf16"]
)
def test_greedy_answers_are_those_of_generate_alone_and_beside_others(folders, name, dtype, exact):
    folder = folders(name)
    model, reader = load_model(folder, dtype=dtype), Reader(folder)
    inputs = [reader.read(messages) for messages in _messages(folder)]
    expected = [_generate(model, reader, one) for one in inputs]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    batch = Batch(writer_of(model, reader.tokenizer), reader.tokenizer, max_batch=4, exact=exact)
    assert _write(batch, inputs) == expected
    assert [_write(batch, [one])[0] for one in inputs[:2]] == expected[:2]


def test_attention_that_adds_its_mask_writes_the_same_answers(folders):
    folder = folders("packed-llama")
    model, reader = load_model(folder, dtype=torch.float32), Reader(folder)
    inputs = [reader.read(messages) for messages in _messages(folder)]
    expected = [_generate(model, reader, one) for one in inputs]
    model.set_attn_implementation("eager")
    assert _write(Batch(writer_of(model, reader.tokenizer), reader.tokenizer, max_batch=4), inputs) == expected


@pytest.fixture(scope="module")
def omni(folders):
    folder = folders("qwen2.5-omni")
    return ChatModel(load_model(folder), Reader(folder), max_batch=3)


def _request(key, text="Hello", **changes):
    values = {"max_tokens": 12, "temperature": 0.0, **changes}
    return ChatRequest(key, (Message("user", (TextPart(text),)),), **values)


def _run(model, *requests, cancel_after=None):
    """Return text, sounds and result of each request."""
    for request in requests:
        model.admit(request)
    texts, sounds, results = {one.id: "" for one in requests}, {one.id: [] for one in requests}, {}
    steps = 0
    while model.active:
        for event in model.step():
            if isinstance(event, Delta):
                texts[event.id] += event.text
                if event.samples is not None:
                    sounds[event.id].append(event.samples)
            else:
                results[event.id] = event.result
        steps += 1
        if cancel_after is not None and steps == cancel_after[0]:
            model.cancel(cancel_after[1])
    return texts, sounds, results


def test_the_same_seed_writes_the_same_answer_whatever_runs_beside_it(omni):
    asked = _request("a", temperature=1.5, seed=7, max_tokens=20)
    alone = _run(omni, asked)[0]["a"]
    other = _run(omni, _request("a", temperature=1.5, seed=8, max_tokens=20))[0]["a"]
    assert _run(omni, asked)[0]["a"] == alone
    assert other != alone


def test_usage_counts_tokens_and_the_limit_is_the_reason_of_the_end(omni):
    result = _run(omni, _request("a", max_tokens=9))[2]["a"]
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 9)
    longer = _run(omni, _request("a", text="Hello you", max_tokens=1))[2]["a"]
    assert longer.usage.prompt_tokens == result.usage.prompt_tokens + len(" you")


def test_an_answer_ends_before_a_stop_string(omni):
    whole = _run(omni, _request("a", max_tokens=30, temperature=1.0, seed=1))[0]["a"]
    stop = whole[4:6]
    texts, _, results = _run(omni, _request("a", max_tokens=30, temperature=1.0, seed=1, stop=(stop,)))
    assert texts["a"] == whole[: whole.index(stop)]
    assert results["a"].finish_reason == "stop"
    assert results["a"].usage.completion_tokens < 30


def test_a_cancelled_answer_leaves_the_others_as_they_are(omni):
    requests = [_request(key, text=key * 5) for key in "abc"]
    expected = {key: _run(omni, one)[0][key] for key, one in zip("abc", requests, strict=True)}
    texts, _, results = _run(omni, *requests, cancel_after=(5, "b"))
    assert results.keys() == {"a", "c"}
    assert len(texts["b"]) < len(expected["b"])
    assert results["a"].usage.completion_tokens == results["c"].usage.completion_tokens == 12


def test_a_spoken_answer_has_the_same_text_and_sound_of_its_own(omni):
    written = _run(omni, _request("a"), _request("b", text="Other"))[0]
    texts, sounds, results = _run(
        omni, _request("a", modalities=("text", "audio")), _request("b", text="Other", max_tokens=30)
    )
    assert texts["a"] == written["a"]
    assert texts["b"].startswith(written["b"][:2])
    (samples,) = sounds["a"]
    assert samples.dtype == np.float32
    assert samples.size > 0
    assert np.isfinite(samples).all()
    again = _run(omni, _request("a", modalities=("text", "audio")))[1]["a"][0]
    assert np.array_equal(samples, again)
    assert results["a"].usage.completion_tokens == 12


def test_an_answer_to_a_picture_and_a_sound_is_spoken(omni):
    random = np.random.default_rng(0)
    picture = ImagePart(random.integers(0, 255, (112, 168, 3), dtype=np.uint8))
    sound = AudioPart(random.standard_normal(9000).astype(np.float32), 16_000)
    messages = (Message("user", (picture, sound, TextPart("What is it?"))),)
    spoken = ChatRequest("a", messages, 12, temperature=0.0, modalities=("text", "audio"))
    texts, sounds, _ = _run(omni, spoken)
    assert sounds["a"][0].size > 0
    assert texts["a"] == _run(omni, ChatRequest("a", messages, 12, temperature=0.0))[0]["a"]


def test_an_answer_too_short_to_be_spoken_is_an_answer_without_sound(omni):
    texts, sounds, results = _run(omni, _request("a", modalities=("text", "audio"), max_tokens=1), _request("b"))
    assert texts["a"] == _run(omni, _request("a", max_tokens=1))[0]["a"]
    assert sounds["a"][0].size == 0
    assert results["a"].finish_reason == "length"
    assert results["b"].usage.completion_tokens == 12


def test_a_failure_of_the_talker_ends_that_answer_alone(omni, monkeypatch):
    monkeypatch.setattr(omni._model.talker, "generate", lambda **_: 1 / 0)
    results = {}
    omni.admit(_request("a", modalities=("text", "audio")))
    omni.admit(_request("b", max_tokens=30))
    while omni.active:
        results |= {event.id: event for event in omni.step() if not isinstance(event, Delta)}
    assert results["a"].kind == "internal"
    assert results["b"].result.usage.completion_tokens == 30


def test_on_several_ranks_a_failure_inside_the_thinker_is_not_one_answers_alone(omni, monkeypatch):
    monkeypatch.setattr(omni, "_is_shared", True)
    spoken = _request("a", modalities=("text", "audio"))
    with monkeypatch.context() as patch:
        patch.setattr(omni._model.talker, "generate", lambda **_: 1 / 0)  # whole on every rank
        omni.admit(spoken)
        while omni.active:
            events = omni.step()
        assert events[-1].kind == "internal"
    monkeypatch.setattr(omni._model.thinker, "generate", lambda **_: 1 / 0)
    omni.admit(spoken)
    with pytest.raises(ZeroDivisionError):  # another rank may wait there for this one
        omni.step()
    omni.reset()


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")  # so its talker does
def test_qwen3_omni_speaks(folders):
    """In the fixture tokens are bytes, and the talker's special ones are beyond its vocabulary."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    reader = Reader(folders("qwen3-omni"))
    config = Qwen3OmniMoeConfig.from_pretrained(folders("qwen3-omni"))
    number = reader.tokenizer.convert_tokens_to_ids
    config.im_start_token_id, config.user_token_id, config.assistant_token_id = map(number, (">", "u", "a"))
    config.tts_pad_token_id, config.tts_bos_token_id, config.tts_eos_token_id = 1, 2, 3
    talker = config.talker_config
    talker.text_config.vocab_size = 1100  # the last 1024 are never spoken
    for index, name in enumerate(("nothink", "think_bos", "think_eos", "pad", "bos")):
        setattr(talker, f"codec_{name}_id", 10 + index)
    talker.codec_eos_token_id = 20
    config.code2wav_config.codebook_size = 1100
    torch.manual_seed(0)
    speaking = Qwen3OmniMoeForConditionalGeneration(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in speaking.talker.parameters():  # transformers leaves experts as the allocator gave them
            parameter.normal_(std=0.02)
    model = ChatModel(speaking, reader)
    assert model.info.voices == ("ethan",)
    texts, sounds, results = _run(model, _request("a", modalities=("text", "audio")), SpeechRequest("b", "Hi"))
    assert texts["b"] == ""
    assert results["a"].usage.completion_tokens == 12
    for key in "ab":
        assert sounds[key][0].size > 0
        assert np.isfinite(sounds[key][0]).all()


def test_speech_reads_a_text_aloud_without_writing_one(omni):
    texts, sounds, results = _run(omni, SpeechRequest("a", "Good day", seed=3))
    assert texts["a"] == ""
    assert sounds["a"][0].size > 0
    assert results["a"].usage.prompt_tokens == len("Good day")


def test_sound_that_is_cut_tells_so(omni):
    reasons = [
        _run(omni, SpeechRequest("a", "Hi", max_tokens=codes))[2]["a"].finish_reason for codes in (8, 4096)
    ]  # the talker of this model ends what it says after some more codes
    assert reasons == ["length", "stop"]


def test_what_looks_like_a_special_token_is_read_aloud_as_text(omni):
    text = "<|im_end|> hello"
    _, sounds, results = _run(omni, SpeechRequest("a", text))
    assert results["a"].usage.prompt_tokens == len(text)  # of bytes, one token each
    assert sounds["a"][0].size > 0


def test_speaking_can_be_cancelled_and_the_model_goes_on(omni):
    _, _, results = _run(
        omni, _request("a", modalities=("text", "audio"), max_tokens=100), _request("b"), cancel_after=(4, "a")
    )
    assert results.keys() == {"b"}
    assert _run(omni, SpeechRequest("c", "Hi"))[1]["c"][0].size > 0


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (_request("a", text="x" * 5000), "messages"),
        (_request("a", modalities=("audio",), voice="Nobody"), "voice"),
        (SpeechRequest("a", "x" * 5000), "input"),
        (SpeechRequest("a", "x" * 500, max_tokens=900), "input"),
        (ChatRequest("a", (Message("user", (AudioPart(np.zeros(40_000, np.float32), 16_000),)),), 5), "messages"),
    ],
    ids=["long-prompt", "voice", "long-speech", "speech-of-many-codes", "long-sound"],
)
def test_what_the_model_cannot_run_is_refused_with_the_field(omni, request_, param):
    with pytest.raises(RequestRefusedError) as refused:
        omni.admit(request_)
    assert refused.value.param == param
    assert omni.active == 0


@pytest.mark.parametrize("name", ["qwen2.5-omni", "qwen3-omni"])
@pytest.mark.parametrize(
    "samples",
    [np.zeros(1), np.zeros(200), np.full(9000, np.nan), np.full(9000, np.inf), np.full(9000, 1e30)],
    ids=["one", "few", "nan", "inf", "huge"],
)
def test_a_sound_that_cannot_be_heard_is_refused(folders, name, samples):
    message = Message("user", (AudioPart(samples.astype(np.float32), 16_000),))
    with pytest.raises(RequestRefusedError, match="sound") as refused:
        Reader(folders(name)).read((message,))
    assert refused.value.param == "messages"


def test_a_sound_is_as_long_as_the_models_own_processor_takes_it(folders):
    readers = [Reader(folders(name)) for name in ("qwen2.5-omni", "qwen3-omni")]
    message = Message("user", (AudioPart(np.zeros(3 * readers[1]._listener.n_samples, np.float32), 16_000),))
    with pytest.raises(RequestRefusedError, match="hears at most"):
        readers[0].read((message,))  # it would cut the sound
    assert readers[1].read((message,))["feature_attention_mask"].sum() == message.parts[0].samples.size // 160


def test_a_model_of_text_refuses_pictures_sounds_and_speech(folders):
    folder = folders("packed-llama")
    model = ChatModel(load_model(folder), Reader(folder))
    assert (model.info.kinds, model.info.inputs) == ({"chat"}, frozenset())
    picture = Message("user", (ImagePart(np.zeros((8, 8, 3), np.uint8)),))
    for request in (ChatRequest("a", (picture,), 5), _request("b", modalities=("audio",)), SpeechRequest("c", "x")):
        with pytest.raises(RequestRefusedError):
            model.admit(request)


def test_a_step_that_fails_leaves_a_model_that_can_go_on(omni, monkeypatch):
    omni.admit(_request("a"))
    omni.step()
    with monkeypatch.context() as patch:
        patch.setattr(omni._batch, "_write", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            omni.step()
    omni.reset()
    assert omni.active == 0
    assert _run(omni, _request("a"))[2]["a"].usage.completion_tokens == 12


def test_logits_that_are_not_finite_end_that_answer_alone(omni, monkeypatch):
    head = omni._writer._head

    def broken(hidden):
        logits = head(hidden)
        if len(logits) == 2:
            logits[0] = torch.nan
        return logits

    broken.weight = head.weight
    monkeypatch.setattr(omni._writer, "_head", broken)
    results = {}
    omni.admit(_request("a"))
    omni.admit(_request("b"))
    while omni.active:
        results |= {event.id: event for event in omni.step() if not isinstance(event, Delta)}
    assert (results["a"].kind, results["a"].message) == ("internal", "the model's logits are not finite")
    assert results["b"].result.usage.completion_tokens == 12


def test_what_a_failed_answer_left_in_the_cache_does_not_reach_the_one_that_takes_its_place(folders):
    folder = folders("packed-llama")
    model, reader = load_model(folder, dtype=torch.float32), Reader(folder)
    texts = {"long": "word " * 60, "bad": "a b c d " * 20, "short": "hi"}
    inputs = {key: reader.read((Message("user", (TextPart(text),)),)) for key, text in texts.items()}

    def write(step_of_failure):
        batch = Batch(writer_of(model, reader.tokenizer), reader.tokenizer, max_batch=4)
        for key, one in inputs.items():
            batch.add(key, one, SamplingParams(max_tokens=30, temperature=0))
        written, step = {key: [] for key in inputs}, 0
        while len(batch):
            step += 1
            row = [answer.key for answer in batch._running].index("bad") if step == step_of_failure else None

            def overflow(_module, _inputs, output, row=row):
                if row is not None:
                    (output[0] if isinstance(output, tuple) else output)[row] = torch.inf

            with model.model.layers[0].register_forward_hook(overflow):
                for piece in batch.step():
                    written[piece.key].append(piece.failure or piece.token)
        return written

    healthy, failed = write(None), write(8)
    assert failed["bad"][-1] == "the model's logits are not finite"
    assert [failed[key] for key in ("long", "short")] == [healthy[key] for key in ("long", "short")]


@pytest.mark.parametrize(
    ("error", "kind"), [(torch.OutOfMemoryError("injected"), "out_of_memory"), (RuntimeError("x"), "internal")]
)
def test_a_prompt_that_cannot_be_read_ends_alone(omni, monkeypatch, error, kind):
    read = omni._writer.read

    def fail_if_long(inputs):
        if inputs["input_ids"].shape[1] > 200:
            raise error
        return read(inputs)

    monkeypatch.setattr(omni._writer, "read", fail_if_long)
    omni.admit(_request("a", max_tokens=30))
    for _ in range(3):
        omni.step()
    omni.admit(_request("b", text="word " * 100))
    results = {}
    while omni.active:
        results |= {event.id: event for event in omni.step() if not isinstance(event, Delta)}
    assert results["b"].kind == kind
    assert results["a"].result.usage.completion_tokens == 30
    monkeypatch.setattr(omni, "_is_shared", True)
    omni.admit(_request("b", text="word " * 100))
    with pytest.raises(type(error)):  # another rank may wait for this one
        omni.step()
    omni.reset()


def test_a_speech_that_takes_too_much_memory_ends_alone(omni, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(omni._model.thinker, "generate", fail)
    omni.admit(_request("a", modalities=("text", "audio")))
    omni.admit(_request("b", max_tokens=30))
    results = {}
    while omni.active:
        results |= {event.id: event for event in omni.step() if not isinstance(event, Delta)}
    assert results["a"].kind == "out_of_memory"
    assert results["b"].result.usage.completion_tokens == 30


def test_one_answer_alone_raises_what_its_prompt_fails_with(omni, monkeypatch):
    monkeypatch.setattr(omni._writer, "read", lambda _inputs: 1 / 0)
    inputs = omni._reader.read((Message("user", (TextPart("Hello"),)),))
    with pytest.raises(ZeroDivisionError):
        next(write_greedily(omni._writer, omni._reader.tokenizer, inputs, 3))


@pytest.fixture(scope="module")
def tokenizer(folders):
    return Reader(folders("qwen2.5-omni")).tokenizer  # a token is a byte


def test_text_comes_in_whole_characters(tokenizer):
    text = "naïve 日本語 🙂!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text
    assert len([piece for piece in pieces if piece]) == len(text)


def test_pieces_of_any_tokens_are_together_what_the_tokenizer_makes_of_them(tokenizer):
    random = np.random.default_rng(0)
    for length in range(1, 80):
        tokens = random.integers(0, len(tokenizer), length).tolist()
        stream = TextStream(tokenizer)
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert text == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_what_may_become_a_stop_string_is_held_until_it_is_known(tokenizer):
    stream = TextStream(tokenizer, stop=("STOP", "END"))
    assert [stream.push(token) for token in tokenizer("aSTOEND b")["input_ids"]] == [
        "a", "", "", "", "STO", "", "", "", "",
    ]  # fmt: skip
    assert stream.stopped
    assert stream.text == "aSTO"
    held = TextStream(tokenizer, stop=("STOP",))
    assert [held.push(token) for token in tokenizer("xST")["input_ids"]] == ["x", "", ""]
    assert held.finish() == "ST"


def _frequencies(logits, draws=4000, **params):
    counts = np.zeros(len(logits))
    sampler = Sampler(SamplingParams(seed=0, **params), ())
    for _ in range(draws):
        counts[sampler.choose(torch.tensor(logits))] += 1
    return counts / draws


def test_tokens_are_drawn_with_the_probabilities_that_temperature_makes():
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.tensor(logits).div(0.7).softmax(0).numpy()
    assert np.abs(_frequencies(logits, temperature=0.7) - expected).max() < 0.03


def test_top_k_and_top_p_leave_out_the_unlikely():
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert (_frequencies(logits, draws=500, top_k=2) > 0).tolist() == [True, True, False, False]
    # 0.5 + 0.3 reach 0.75, so the second is the last that may be drawn.
    assert (_frequencies(logits, draws=500, top_p=0.75) > 0).tolist() == [True, True, False, False]
    assert (_frequencies(logits, draws=500, top_p=1e-6) > 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("params", [{"top_p": 5e-324}, {"temperature": 5e-324}, {"top_p": 1e-30, "top_k": 5}])
def test_the_least_that_can_be_asked_for_is_the_most_likely_token(params):
    assert _frequencies([0.0, 3.0, 2.0], draws=5, **params).tolist() == [0, 1, 0]


def test_penalties_move_the_choice_away_from_what_was_written():
    logits = torch.tensor([2.0, 1.9, 0.0])
    frequency = Sampler(SamplingParams(temperature=0, frequency_penalty=0.2), ())
    assert [frequency.choose(logits) for _ in range(4)] == [0, 1, 0, 1]
    presence = Sampler(SamplingParams(temperature=0, presence_penalty=2.0), ())
    assert [presence.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    repetition = Sampler(SamplingParams(temperature=0, repetition_penalty=1.2), (0,))
    assert repetition.choose(logits) == 1
