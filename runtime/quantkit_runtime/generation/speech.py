"""Answers that are spoken: an omni model's thinker writes, its talker speaks what was written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit_runtime.generation.batch import FinishReason
from quantkit_runtime.generation.sampling import Sampler, SamplingParams
from quantkit_runtime.generation.text import TextStream
from quantkit_runtime.generation.turns import Turns
from quantkit_runtime.generation.writer import end_tokens

SAMPLE_RATE = 24_000
"""Samples per second of what the Qwen omni models speak."""

_TOKENS_AT_LEAST = 2
_CODES_AT_LEAST = 64
_CODES_PER_TOKEN = (
    32  # speech takes about ten codes for each token of text; a talker that runs away takes any number
)

LEAST_CODES_PER_TOKEN = 2
"""Codes that a token of text takes at least, of a fast speaker at 12 codes a second."""

_LEAST_CODES = 2  # one that is heard, and the end; without any the models' decoders fail
_THINKERS_OWN = ("pixel_values",)  # Qwen2.5-Omni would hand it to its talker, too, which refuses it


class _NothingToSay(Exception):  # noqa: N818  (no error: the answer is complete without sound)
    """Raised where a text ends that is too short for the talker, which begins with its second token."""


@dataclass(frozen=True)
class Spoken:
    """A spoken answer.

    Attributes:
        tokens: Of the text.
        samples: float32 (samples,) in [-1, 1], `SAMPLE_RATE` of them a second.
        finish_reason: Why the answer ends; ``length`` where text or sound was cut.
    """

    tokens: tuple[int, ...]
    samples: np.ndarray
    finish_reason: FinishReason


def voices(model: Any) -> tuple[str, ...]:
    """Return the names of a model's voices, the default first; empty if it cannot speak."""
    if not getattr(model, "has_talker", False):
        return ()
    known = getattr(model, "speaker_map", None)
    if known is None:
        known = model.config.talker_config.speaker_id or {}
    return tuple(known)


class Speaker:
    """Speaks one answer, a token or code per step.

    The text is the same that `Batch` writes for the same prompt and parameters. What the talker adds is drawn from
    torch's own random numbers, seeded with the answer's seed.

    Args:
        model: An omni model with a talker.
        tokenizer: Of the model.
        inputs: The processor's, a batch of one.
        params: How the text is written.
        voice: One of `voices`.
        script: Tokens that are read aloud, instead of an answer.
        max_codes: Of the talker; about 25 to 50 are a second of sound.
        on_token: Called with each token, and what is certain of the text by it and was not before.

    Attributes:
        has_text: Whether the text is complete; what is left is the talker's work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        inputs: Mapping[str, Tensor],
        params: SamplingParams,
        voice: str,
        *,
        script: Sequence[int] | None = None,
        max_codes: int = 4096,
        on_token: Callable[[int, str], None] = lambda _token, _text: None,
    ) -> None:
        self.has_text = False
        self._model = model
        self._inputs = inputs
        self._params = params
        self._voice = voice
        self._ends = end_tokens(model.thinker, tokenizer)
        self._script = None if script is None else [*script, min(self._ends)]
        self._max_codes = max_codes
        self._stream = TextStream(tokenizer, params.stop)
        self._on_token = on_token
        self._prompt = tuple(inputs["input_ids"][0].tolist())
        self._tokens: list[int] = []
        self._reason: FinishReason = "length"
        self._turns = Turns(self._speak)

    def step(self) -> bool:
        """Go on by one token or code; return whether the answer is complete."""
        return self._turns.step()

    def stop(self) -> None:
        """Give up."""
        self._turns.stop()

    @property
    def result(self) -> Spoken:
        """The answer, once it is complete."""
        return self._turns.result

    def _speak(self, give_way: Callable[[], None]) -> Spoken:
        model, sampler = self._model, Sampler(self._params, self._prompt)
        device = model.thinker.get_output_embeddings().weight.device
        codes, is_cut = 0, False
        code_ends = _code_ends(model)

        def choose(_ids: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: N803  (shape suffix)
            """Leave no token but the one that is to come."""
            token = sampler.choose(scores_BV[0]) if self._script is None else self._script[len(self._tokens)]
            self._tokens.append(token)
            only = torch.full_like(scores_BV, -torch.inf)
            only[:, token] = 0
            return only

        def after_token(ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
            give_way()
            ended = self._take()
            if ended and len(self._tokens) < _TOKENS_AT_LEAST:
                raise _NothingToSay
            return torch.tensor([ended], device=ids.device)

        def after_code(ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
            nonlocal codes, is_cut
            give_way()
            codes += 1
            most = min(_CODES_AT_LEAST + _CODES_PER_TOKEN * len(self._tokens), self._max_codes)
            is_cut = codes >= most and int(ids[0, -1]) not in code_ends
            return torch.tensor([codes >= most], device=ids.device)

        # The talker has no generator of its own to be given.
        torch.manual_seed(self._params.seed if self._params.seed is not None else int(torch.seed() % 2**63))
        with torch.inference_mode(), contextlib.suppress(_NothingToSay):
            _, samples = model.generate(
                **{
                    f"thinker_{name}" if name in _THINKERS_OWN else name: value.to(device)
                    for name, value in self._inputs.items()
                },
                speaker=self._voice,
                thinker_do_sample=False,
                thinker_repetition_penalty=1.0,  # the sampler's own business
                thinker_max_new_tokens=len(self._script or ()) or self._params.max_tokens,
                thinker_eos_token_id=sorted(self._ends),
                thinker_logits_processor=[choose],
                thinker_stopping_criteria=[after_token],
                talker_stopping_criteria=[after_code],
                talker_min_new_tokens=_LEAST_CODES,
                talker_max_new_tokens=self._max_codes,
                talker_eos_token_id=code_ends,
            )
            reason: FinishReason = "length" if is_cut else self._reason
            return Spoken(tuple(self._tokens), samples.reshape(-1).float().cpu().numpy(), reason)
        return Spoken(tuple(self._tokens), np.zeros(0, np.float32), self._reason)

    def _take(self) -> bool:
        """Tell of the last token; return whether the text ends with it."""
        token = self._tokens[-1]
        ended = token in self._ends
        text = self._stream.push(token)
        full = self._script is None and len(self._tokens) >= self._params.max_tokens
        self.has_text = ended or full or self._stream.stopped
        if self.has_text:
            text += self._stream.finish()
        if ended or self._stream.stopped:
            self._reason = "stop"
        self._on_token(token, text)
        return self.has_text


def _code_ends(model: Any) -> list[int]:
    """Codes that end the talker's work; Qwen2.5-Omni's ``generate`` knows only those of the published model."""
    config = model.config.talker_config
    if hasattr(config, "tts_codec_end_token_id"):
        return [config.tts_codec_pad_token_id, config.tts_codec_end_token_id]
    return [config.codec_eos_token_id]
