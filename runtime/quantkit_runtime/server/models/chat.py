"""Models that one talks to: text, pictures and sound in, text and speech out."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit_runtime.errors import ParallelError, QuantkitRuntimeError
from quantkit_runtime.generation.batch import Batch, FinishReason, Piece
from quantkit_runtime.generation.sampling import SamplingParams
from quantkit_runtime.generation.speech import LEAST_CODES_PER_TOKEN, SAMPLE_RATE, Speaker, voices
from quantkit_runtime.generation.writer import writer_of
from quantkit_runtime.parallel.tensor import group_of
from quantkit_runtime.server.failures import classify, free_memory, is_broken
from quantkit_runtime.server.models.base import RequestRefusedError, StreamingModel, place_of
from quantkit_runtime.server.models.conversation import Reader
from quantkit_runtime.server.protocol import (
    Answer,
    ChatRequest,
    Delta,
    Event,
    Failed,
    Finished,
    Kind,
    Message,
    ModelInfo,
    ModelSpec,
    Request,
    SpeechRequest,
    TextPart,
    Usage,
)

log = logging.getLogger(__name__)

_PARAMETERS = frozenset(
    {
        "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
        "presence_penalty", "frequency_penalty", "repetition_penalty",
    }
)  # fmt: skip
_MAX_BATCH = 8
_READ_ALOUD = "Repeat after me."  # what a speech answers; the answer is given, so it hardly matters


def load(spec: ModelSpec) -> ChatModel:
    """Load a model that writes text.

    Raises:
        QuantkitRuntimeError: It cannot be loaded, or writes no text.
    """
    from quantkit_runtime.load import load_model
    from quantkit_runtime.optional import import_optional

    import_optional("transformers.utils.logging").disable_progress_bar()
    if spec.cfg_parallel > 1:
        raise ParallelError(
            f"--cfg-parallel {spec.cfg_parallel}: {spec.path} is a chat model, which has no guidance to share; "
            "--tensor-parallel shares its weights"
        )
    if spec.cuda_graphs:
        raise QuantkitRuntimeError(
            f"--cuda-graphs: {spec.path} is a chat model, which has no denoising steps to record; leave it out"
        )
    device, mesh = place_of(spec)
    model = load_model(
        spec.path,
        device=device,
        dtype=getattr(torch, spec.dtype),
        compute=spec.compute,
        backend=spec.backend,
        compile=spec.compile,
        tensor_parallel=None if mesh is None else mesh["tensor"],
    )
    return ChatModel(model, Reader(Path(spec.path)), max_batch=spec.max_batch, exact=spec.exact)


@dataclass
class _Active:
    """A request between its admission and its end."""

    request: ChatRequest | SpeechRequest
    prompt_tokens: int
    begin: float
    completion_tokens: int = 0


@dataclass
class _ToSpeak:
    """An answer that waits for the talker, which speaks one at a time."""

    key: str
    inputs: dict[str, Any]
    params: SamplingParams
    voice: str
    script: list[int] | None = None
    max_codes: int = 4096


class ChatModel(StreamingModel):
    """One model and the answers it is writing.

    Args:
        model: Of transformers, from `load_model`.
        reader: Of the same folder.
        max_batch: Answers at once; None is a default.
        exact: See `Batch`.
    """

    def __init__(self, model: Any, reader: Reader, *, max_batch: int | None = None, exact: bool = False) -> None:
        self._model = model
        self._is_shared = group_of(model) is not None
        self._reader = reader
        self._writer = writer_of(model, reader.tokenizer)
        most = max_batch or _MAX_BATCH
        self._batch = Batch(self._writer, reader.tokenizer, max_batch=most, exact=exact)
        self._active: dict[str, _Active] = {}
        self._to_speak: deque[_ToSpeak] = deque()
        self._speaker: tuple[str, Speaker] | None = None
        self._said: list[Delta] = []
        self.info = self._describe(most)

    @property
    def active(self) -> int:
        """See `StreamingModel.active`."""
        return len(self._active)

    def warm_up(self) -> None:
        """Write two tokens."""
        hello = Message("user", (TextPart("Hello"),))
        self.admit(ChatRequest("warm-up", (hello,), max_tokens=2, temperature=0))
        while self.active:
            self.step()

    def admit(self, request: Request) -> None:
        """Read a request; its answer begins with the next step."""
        if isinstance(request, SpeechRequest):
            self._admit_speech(request)
            return
        assert isinstance(request, ChatRequest)
        inputs = self._reader.read(request.messages)
        count = inputs["input_ids"].shape[1]
        params = self._params(request, count)
        if "audio" in request.modalities:
            voice = self._voice(request.voice)
            self._to_speak.append(_ToSpeak(request.id, inputs, params, voice))
        else:
            self._batch.add(request.id, inputs, params)
        self._active[request.id] = _Active(request, count, time.perf_counter())

    def step(self) -> list[Event]:
        """Write a token of every answer, and a token or code of the one that is spoken."""
        events: list[Event] = []
        if len(self._batch):
            for piece in self._batch.step():
                events += self._tell(piece)
        if self._to_speak or self._speaker is not None:
            events += self._speak()
        return events

    def cancel(self, request_id: str) -> None:
        """Forget an answer."""
        self._active.pop(request_id, None)
        self._batch.cancel(request_id)
        self._to_speak = deque(waiting for waiting in self._to_speak if waiting.key != request_id)
        if self._speaker is not None and self._speaker[0] == request_id:
            self._stop_speaking()

    def reset(self) -> None:
        """Forget all answers."""
        self._active.clear()
        self._batch.clear()
        self._to_speak.clear()
        self._stop_speaking()

    def _describe(self, max_batch: int) -> ModelInfo:
        found = voices(self._model)
        kinds: tuple[Kind, ...] = ("chat", "speech") if found else ("chat",)
        return ModelInfo(
            kinds=frozenset(kinds),
            parameters=_PARAMETERS,
            defaults=dict(self._writer.defaults),
            inputs=self._reader.inputs,
            outputs=frozenset({"text", "audio"} if found else {"text"}),
            voices=found,
            max_batch=max_batch,
            description=type(self._model).__name__,
        )

    def _params(self, request: ChatRequest, count: int) -> SamplingParams:
        room = self._writer.max_context - count
        if room < 1:
            raise RequestRefusedError(
                f"messages: {count} tokens; the model's context has {self._writer.max_context} with the answer",
                "messages",
            )

        def given(name: str, otherwise: float) -> Any:
            value = getattr(request, name)
            return self.info.defaults.get(name, otherwise) if value is None else value

        return SamplingParams(
            max_tokens=min(request.max_tokens, room),
            temperature=float(given("temperature", 1.0)),
            top_p=float(given("top_p", 1.0)),
            top_k=int(given("top_k", 0)),
            seed=request.seed,
            stop=request.stop,
            presence_penalty=float(given("presence_penalty", 0.0)),
            frequency_penalty=float(given("frequency_penalty", 0.0)),
            repetition_penalty=float(given("repetition_penalty", 1.0)),
        )

    def _voice(self, name: str | None) -> str:
        known = self.info.voices
        if not known:
            raise RequestRefusedError(f"modalities: {self.info.description} cannot speak", "modalities")
        if name is None:
            return known[0]
        found = next((voice for voice in known if voice.lower() == name.lower()), None)
        if found is None:
            raise RequestRefusedError(f"voice: {name!r} is unknown; use {', '.join(known)}", "voice")
        return found

    def _admit_speech(self, request: SpeechRequest) -> None:
        """Have the talker speak a text as if the thinker had answered so."""
        voice = self._voice(request.voice)
        # What looks like a special token is read aloud as text; as a token it would end the answer.
        tokenize = self._reader.tokenizer
        script = tokenize(request.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        inputs = self._reader.read([Message("user", (TextPart(_READ_ALOUD),))])
        count = inputs["input_ids"].shape[1]
        most = min(self._writer.max_context - count - 1, request.max_tokens // LEAST_CODES_PER_TOKEN)
        if len(script) > most:
            raise RequestRefusedError(f"input: {len(script)} tokens; at most {most} can be spoken here", "input")
        params = SamplingParams(max_tokens=len(script) + 1, temperature=0, seed=request.seed)
        self._to_speak.append(_ToSpeak(request.id, inputs, params, voice, list(script), request.max_tokens))
        self._active[request.id] = _Active(request, len(script), time.perf_counter())

    def _tell(self, piece: Piece) -> list[Event]:
        if piece.error is not None:
            return [self._fail(piece.key, piece.error)]
        if piece.failure is not None:
            del self._active[piece.key]
            return [Failed(piece.key, "internal", piece.failure)]
        active = self._active[piece.key]
        active.completion_tokens += 1
        events: list[Event] = [Delta(piece.key, piece.text, (piece.token,))]
        if piece.finish_reason is not None:
            events.append(self._end(piece.key, piece.finish_reason))
        return events

    def _speak(self) -> list[Event]:
        if self._speaker is None:
            self._speaker = self._begin(self._to_speak.popleft())
        key, speaker = self._speaker
        try:
            done = speaker.step()
        except Exception as error:  # noqa: BLE001  (raised again, or logged)
            self._speaker = None
            self._said.clear()
            return [self._fail(key, error, of_this_rank=speaker.has_text)]
        events: list[Event] = list(self._said)
        self._said.clear()
        if done:
            self._speaker = None
            spoken = speaker.result
            self._active[key].completion_tokens = len(spoken.tokens)
            events.append(Delta(key, samples=spoken.samples, rate=SAMPLE_RATE))
            events.append(self._end(key, spoken.finish_reason))
        return events

    def _fail(self, key: str, error: Exception, *, of_this_rank: bool = False) -> Failed:
        """Return the end of one answer that failed, if the others can go on.

        Args:
            key: Of the answer.
            error: Why.
            of_this_rank: Whether it was at what is whole on every rank, so that no other one waits for this.

        Raises:
            Exception: The error, if the others cannot.
        """
        kind, message, _ = classify(error)
        if is_broken(error) or (self._is_shared and (not of_this_rank or kind == "out_of_memory")):
            raise error
        log.error("answer failed", exc_info=error, extra={"request_id": key})
        if kind == "out_of_memory":
            free_memory(error)
        del self._active[key]
        return Failed(key, kind, message)

    def _begin(self, one: _ToSpeak) -> tuple[str, Speaker]:
        def say(token: int, text: str) -> None:
            if one.script is None:
                self._said.append(Delta(one.key, text, (token,)))

        speaker = Speaker(
            self._model,
            self._reader.tokenizer,
            one.inputs,
            one.params,
            one.voice,
            script=one.script,
            max_codes=one.max_codes,
            on_token=say,
        )
        return one.key, speaker

    def _stop_speaking(self) -> None:
        if self._speaker is not None:
            self._speaker[1].stop()
            self._speaker = None
        self._said.clear()

    def _end(self, key: str, reason: FinishReason) -> Finished:
        active = self._active.pop(key)
        usage = Usage(active.prompt_tokens, active.completion_tokens)
        seconds = time.perf_counter() - active.begin
        return Finished(key, Answer(reason, usage), seconds, peak_memory_bytes=0)  # the engine knows it
