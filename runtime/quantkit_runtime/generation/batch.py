"""Continuous batching: answers join and leave a running batch between any two tokens.

transformers' own facility (``generate_batch``) takes token ids and counts positions one by one. The thinkers of
omni models read images and audio, and their positions have three axes; so prompts go through the model's own
forward, and the batch is kept here, the same for every model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit_runtime.generation.cache import SlotCache
from quantkit_runtime.generation.sampling import Sampler, SamplingParams
from quantkit_runtime.generation.text import TextStream
from quantkit_runtime.generation.writer import Inputs, Writer

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
        error: What was raised while its prompt was read, if that is why.
    """

    key: str
    token: int
    text: str
    finish_reason: FinishReason | None
    failure: str | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether the answer ends here."""
        return self.finish_reason is not None or self.failure is not None


@dataclass
class _Answer:
    key: str
    inputs: Inputs
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
        writer: From `writer_of`.
        tokenizer: Of the model.
        max_batch: Answers that are written at once.
        exact: Whether answers must not depend on what is written beside them, not even in rounding.
    """

    def __init__(self, writer: Writer, tokenizer: Any, *, max_batch: int = 8, exact: bool = False) -> None:
        self._writer = writer
        self._tokenizer = tokenizer
        self._max_batch = max_batch
        self._exact = exact
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []  # in the order of the cache's rows
        self._cache = SlotCache()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: str, inputs: Inputs, params: SamplingParams) -> None:
        """Take an answer that is to be written.

        Args:
            key: Names it in `Piece` and for `cancel`.
            inputs: The prompt.
            params: How it is written.

        Raises:
            ValueError: If prompt and ``max_tokens`` do not fit into the model's context.
        """
        prompt = tuple(inputs["input_ids"][0].tolist())
        if len(prompt) + params.max_tokens > self._writer.max_context:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens={params.max_tokens} are more than the model's "
                f"context of {self._writer.max_context}"
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
        """Read a prompt and write the first token; what fails here concerns this answer alone."""
        try:
            read = self._writer.read(answer.inputs)
            answer.position_shift, answer.inputs = read.position_shift, {}
            piece = self._take(answer, read.logits_V)
            if not piece.is_last:
                self._cache.append(read.cache)
        except Exception as error:  # noqa: BLE001  (it is in the piece)
            return Piece(answer.key, -1, "", None, failure=f"{type(error).__name__} in its prompt", error=error)
        if not piece.is_last:
            self._running.append(answer)
        return piece

    def _write(self) -> list[Piece]:
        count = len(self._running)
        parts = [(row, 1) for row in range(count)] if self._exact else [(0, count)]
        logits_BV = torch.cat([self._forward(*part) for part in parts])  # noqa: N806  (shape suffix)
        pieces = [self._take(answer, row) for answer, row in zip(self._running, logits_BV, strict=True)]
        for row in reversed(range(count)):
            if pieces[row].is_last:
                self._remove(row, is_damaged=pieces[row].failure is not None)
        return pieces

    def _forward(self, first: int, count: int) -> Tensor:
        """Return the logits (count, vocabulary) of the next tokens of some rows."""
        positions, mask = self._cache.begin_step(first, count)
        answers = self._running[first : first + count]
        device = positions.device
        tokens = torch.tensor([[answer.token] for answer in answers], device=device)
        shifts = torch.tensor([[answer.position_shift] for answer in answers], device=device)
        logits_BV = self._writer.write(tokens, positions + shifts, mask, self._cache)  # noqa: N806  (shape suffix)
        self._cache.end_step()
        return logits_BV

    def _take(self, answer: _Answer, logits_V: Tensor) -> Piece:  # noqa: N803  (shape suffix)
        if not bool(logits_V.isfinite().all()):
            return Piece(answer.key, -1, "", None, failure="the model's logits are not finite")
        answer.token = answer.sampler.choose(logits_V)
        answer.count += 1
        ended = answer.token in self._writer.ends and not answer.params.ignore_eos
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

    def _remove(self, row: int, *, is_damaged: bool = False) -> None:
        self._cache.remove(row, is_damaged=is_damaged)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last


def write_greedily(writer: Writer, tokenizer: Any, inputs: Inputs, max_tokens: int) -> Iterator[Piece]:
    """Write one answer of the most likely tokens, piece by piece.

    Raises:
        ValueError: At once, see `Batch.add`.
    """
    penalty = float(
        writer.defaults.get("repetition_penalty", 1.0)
    )  # as its authors want it, and `generate` does it
    batch = Batch(writer, tokenizer, max_batch=1)
    batch.add("", inputs, SamplingParams(max_tokens=max_tokens, temperature=0, repetition_penalty=penalty))
    return _pieces(batch)


def _pieces(batch: Batch) -> Iterator[Piece]:
    while len(batch):
        for piece in batch.step():
            if piece.error is not None:
                raise piece.error
            yield piece
