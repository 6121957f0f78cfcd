"""Continuous batching: answers join and leave a running batch between any two tokens.

transformers' own facility (``generate_batch``) takes token ids and counts positions one by one. The thinkers of
omni models read images and audio, and their positions have three axes; so prompts go through the model's own
forward, and the batch is kept here, the same for every model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.generation.cache import SlotCache
from quantkit_runtime.generation.sampling import Sampler, SamplingParams
from quantkit_runtime.generation.text import TextStream
from quantkit_runtime.optional import import_optional

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step adds to one answer.

    Attributes:
        key: Of the answer.
        token: The new token.
        text: What is certain of the text by now and was not before; may be empty.
        finish_reason: Why the answer ends here, as OpenAI calls it; None if it goes on.
        failure: Why it ends without having been written; then there is no token.
    """

    key: str
    token: int
    text: str
    finish_reason: FinishReason | None
    failure: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the answer ends here."""
        return self.finish_reason is not None or self.failure is not None


@dataclass
class _Answer:
    key: str
    inputs: Mapping[str, Tensor]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    count: int = 0
    token: int = -1
    position_shift: int = 0


class Batch:
    """Answers that are written side by side, one token each per step.

    Not thread-safe: one thread adds, steps and cancels. A step reads the prompt of at most one answer that waits,
    and then writes a token of each that does not; so a long prompt delays the others by itself alone.

    Every answer has its own sampling and random numbers. A batch computes what an answer alone does, up to the
    rounding of the kernels, which choose another order of summation for another number of rows: in bfloat16 a
    greedy answer may part ways where two tokens are all but equally likely. With ``exact`` each row goes through
    the model by itself, and the answers are those of ``generate`` to the last bit, whatever else is written; that
    costs the throughput of batching.

    Args:
        writer: A transformers model that writes text, in evaluation mode; of omni models, the thinker.
        tokenizer: Of the model.
        max_batch: Answers that are written at once.
        exact: Whether answers must not depend on what is written beside them, not even in rounding.

    Attributes:
        max_context: Tokens that prompt and answer may have together.
    """

    def __init__(self, writer: Any, tokenizer: Any, *, max_batch: int = 8, exact: bool = False) -> None:
        self._writer = writer
        self._tokenizer = tokenizer
        self._max_batch = max_batch
        self._exact = exact
        self._reader = getattr(writer, writer.base_model_prefix)
        self._decoder = writer.get_decoder()
        self._head = writer.get_output_embeddings()
        self._adds_masks = _adds_masks(self._decoder.config)
        self._ends = end_tokens(writer, tokenizer)
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []  # in the order of the cache's rows
        self._cache = SlotCache()
        self.max_context = _max_context(writer)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: str, inputs: Mapping[str, Tensor], params: SamplingParams) -> None:
        """Take an answer that is to be written.

        Args:
            key: Names it in `Piece` and for `cancel`.
            inputs: The processor's, a batch of one, with ``input_ids`` (1, tokens).
            params: How it is written.

        Raises:
            ValueError: If prompt and ``max_tokens`` do not fit into the model's context.
        """
        prompt = tuple(inputs["input_ids"][0].tolist())
        if len(prompt) + params.max_tokens > self.max_context:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens={params.max_tokens} are more than the model's "
                f"context of {self.max_context}"
            )
        stream = TextStream(self._tokenizer, params.stop)
        self._waiting.append(_Answer(key, inputs, params, Sampler(params, prompt), stream))

    @torch.inference_mode()  # the cache's tensors may not be changed outside of it
    def cancel(self, key: str) -> bool:
        """Drop an answer; return whether there was one of this key."""
        for answer in self._waiting:
            if answer.key == key:
                self._waiting.remove(answer)
                return True
        for row, answer in enumerate(self._running):
            if answer.key == key:
                self._remove(row)
                return True
        return False

    def clear(self) -> None:
        """Drop all answers, e.g. after a step has failed."""
        self._waiting.clear()
        self._running.clear()
        self._cache = SlotCache()

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Write a token of every answer; return what that adds to each."""
        pieces = self._write() if self._running else []
        if self._waiting and len(self._running) < self._max_batch:
            pieces.append(self._read(self._waiting.popleft()))
        return pieces

    def _read(self, answer: _Answer) -> Piece:
        """Read a prompt and write the first token."""
        device = self._head.weight.device
        inputs = {name: value.to(device) for name, value in answer.inputs.items()}
        cache = import_optional("transformers").DynamicCache(config=self._decoder.config)
        hidden_1TH = self._reader(**inputs, past_key_values=cache, use_cache=True).last_hidden_state  # noqa: N806  (shape suffix)
        shift = getattr(self._reader, "rope_deltas", None)  # an image has fewer positions than tokens
        answer.position_shift = 0 if shift is None else int(shift.reshape(-1)[0])
        answer.inputs = {}
        piece = self._take(answer, self._head(hidden_1TH[:, -1:])[0, -1])
        if not piece.is_last:
            self._cache.append(cache)
            self._running.append(answer)
        return piece

    def _write(self) -> list[Piece]:
        count = len(self._running)
        parts = [(row, 1) for row in range(count)] if self._exact else [(0, count)]
        logits_BV = torch.cat([self._forward(*part) for part in parts])  # noqa: N806  (shape suffix)
        pieces = [self._take(answer, row) for answer, row in zip(self._running, logits_BV, strict=True)]
        for row in reversed(range(count)):
            if pieces[row].is_last:
                self._remove(row)
        return pieces

    def _forward(self, first: int, count: int) -> Tensor:
        """Return the logits (count, vocabulary) of the next tokens of some rows."""
        positions, mask = self._cache.begin_step(first, count)
        answers = self._running[first : first + count]
        device = positions.device
        tokens = torch.tensor([[answer.token] for answer in answers], device=device)
        shifts = torch.tensor([[answer.position_shift] for answer in answers], device=device)
        if self._adds_masks:
            lowest = torch.finfo(self._head.weight.dtype).min
            mask = torch.zeros_like(mask, dtype=self._head.weight.dtype).masked_fill(~mask, lowest)
        hidden_B1H = self._decoder(  # noqa: N806  (shape suffix)
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions + shifts,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._cache.end_step()
        logits_BV: Tensor = self._head(hidden_B1H)[:, -1]  # noqa: N806  (shape suffix)
        return logits_BV

    def _take(self, answer: _Answer, logits_V: Tensor) -> Piece:  # noqa: N803  (shape suffix)
        if not bool(logits_V.isfinite().all()):
            return Piece(answer.key, -1, "", None, failure="the model's logits are not finite")
        answer.token = answer.sampler.choose(logits_V)
        answer.count += 1
        ended = answer.token in self._ends and not answer.params.ignore_eos
        text = answer.stream.push(answer.token)
        reason: FinishReason | None = None
        if ended or answer.stream.stopped:
            reason = "stop"
        elif answer.count >= answer.params.max_tokens:
            reason = "length"
        if reason is not None:
            text += answer.stream.finish()
            if answer.stream.stopped:  # by what was held to the end
                reason = "stop"
        return Piece(answer.key, answer.token, text, reason)

    def _remove(self, row: int) -> None:
        self._cache.remove(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last


def end_tokens(writer: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the generation configuration's, else the tokenizer's."""
    found = getattr(writer.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    several: Iterable[int] = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    return frozenset(several)


def _adds_masks(config: Any) -> bool:
    """Return whether attention adds its mask to the scores, where SDPA takes a mask of bool."""
    kind = getattr(config, "_attn_implementation", "sdpa")
    if kind not in ("sdpa", "eager"):
        raise CheckpointFormatError(f"config.json: attention {kind!r} takes no masks of several answers; use sdpa")
    return bool(kind == "eager")


def _max_context(writer: Any) -> int:
    config = writer.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise CheckpointFormatError(
            f"config.json: layer_types: {', '.join(sorted(kinds))}: answers cannot be written with other than "
            "attention layers"
        )
    longest = int(config.max_position_embeddings)
    # Inside its window a sliding layer is a full one; further it would need a mask of its own.
    return min(longest, int(config.sliding_window)) if "sliding_attention" in kinds else longest
