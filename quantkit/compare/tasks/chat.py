"""Chat: greedy answers, and how both models predict the reference's answer token by token.

Free answers part ways at the first token in doubt and say little from there on. So the candidate also reads the
reference's answer, and its prediction of every next token is held against the reference's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.compare.result import AnswerOutput
from quantkit.compare.shots import StepCallback
from quantkit.compare.tasks.base import Context, Score, Task, load_with
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    import torch

_CHUNK_TOKENS = 32  # whose distributions over the vocabulary are held in float64 at a time


@dataclass(frozen=True)
class Loaded:
    """A model with what turns text into its inputs and back."""

    model: Any
    processor: Any

    @property
    def components(self) -> dict[str, Any]:
        """The modules whose weights count."""
        return {"model": self.model}


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and what it predicts where it reads the reference's answer.

    Attributes:
        tokens: Written freely and greedily; the token that ends the answer included.
        pieces: Text of each of them.
        logits: (tokens of the reference's answer, vocabulary), on the CPU in the model's own dtype.
        step_ms: Milliseconds of every token written but the first.
        total_s: Seconds of writing; reading is not in it.
        failure: Why it stopped writing; None if all is well.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    logits: torch.Tensor
    step_ms: tuple[float, ...]
    total_s: float
    failure: str | None = None


@dataclass(frozen=True)
class _Kept:
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]


class Chat(Task[Answer]):
    """One answer per prompt."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._kept: dict[int, _Kept] = {}

    def load(self, folder: Path) -> Loaded:
        """Load model and tokenizer from one folder.

        Raises:
            CheckpointError: If one of them cannot be loaded.
            RecipeError: If the backend cannot run here.
        """
        import quantkit_runtime

        model = load_with(quantkit_runtime.load_model, folder, self.context)
        return Loaded(model, self.context.family.load_processor(folder))

    def record(self, model: Loaded, index: int, on_step: StepCallback) -> Answer:
        """Write an answer, then read the reference's (its own, if there is none yet)."""
        import torch

        from quantkit_runtime.generation.batch import write_greedily
        from quantkit_runtime.generation.text import tokenizer_of
        from quantkit_runtime.generation.writer import writer_of

        tokenizer = tokenizer_of(model.processor)
        writer = writer_of(model.model, tokenizer)
        inputs = self.context.family.ask(model.processor, self.context.shots[index].prompt)
        limit = int(self.context.call_kwargs["max_new_tokens"])
        tokens: list[int] = []
        step_ms: list[float] = []
        failure: str | None = None
        started = last = time.perf_counter()
        try:
            pieces = write_greedily(writer, tokenizer, inputs, limit)
        except ValueError as error:
            raise RecipeError(f"sampling.max_new_tokens: {error}") from error
        for piece in pieces:
            self.context.synchronize()
            now = time.perf_counter()
            if piece.failure is not None:
                failure = f"{piece.failure} after {len(tokens)} tokens of its answer"
                break
            if tokens:
                step_ms.append((now - last) * 1e3)
            tokens.append(piece.token)
            on_step(len(tokens), limit)
            last = time.perf_counter()
        total_s = time.perf_counter() - started
        kept = self._kept.get(index)
        with torch.inference_mode():
            logits = writer.predict(inputs, kept.tokens if kept is not None else tokens or [0]).cpu()
        return Answer(tuple(tokens), _pieces(model.processor, tokens), logits, tuple(step_ms), total_s, failure)

    def failure(self, recording: Answer) -> str | None:
        """Name the first token whose prediction is not finite, or say why it stopped writing."""
        finite = recording.logits.isfinite().all(dim=1)
        if bool(finite.all()):
            return recording.failure
        return f"its logits are not finite from token {int(finite.int().argmin()) + 1} of {len(finite)} on"

    def keep(self, index: int, recording: Answer) -> None:
        """Keep tokens in memory and logits in a file."""
        from safetensors.torch import save

        self._kept[index] = _Kept(recording.tokens, recording.pieces)
        self._logits_file(index).write_bytes(save({"logits": recording.logits.contiguous()}))

    def score(self, index: int, recording: Answer, *, save: bool) -> Score:
        """Compare the predictions along the reference's answer, then the two answers."""
        del save  # answers are part of the result
        kept = self._kept[index]
        failure = self.failure(recording)
        first = first_difference(kept.tokens, recording.tokens)
        curves: dict[str, tuple[float, ...]] = {}
        metrics: dict[str, float] = {}
        agreement: tuple[bool, ...] = ()
        probability: tuple[float, ...] = ()
        if failure is None:
            from safetensors.torch import load_file

            reference = load_file(self._logits_file(index))["logits"]
            found = compare_predictions(reference, recording.logits, kept.tokens)
            agreement, probability = found.agreement, found.probability
            curves = {"token_kl": found.kl, "token_logprob_change": found.logprob_change}
            metrics = {
                "token_agreement": float(np.mean(agreement)),
                "token_kl": float(np.mean(found.kl)),
                "token_kl_max": max(found.kl),
                "token_logprob_change": float(np.mean(found.logprob_change)),
                "token_probability": float(np.mean(probability)),
                "same_prefix": 1.0 if first is None else first / len(kept.tokens),
                "same_answer": float(first is None),
            }
        output = AnswerOutput(
            reference=kept.pieces,
            candidate=recording.pieces,
            agreement=agreement,
            probability=probability,
            first_difference=first,
        )
        return Score(curves, metrics, failure, output)

    def _logits_file(self, index: int) -> Path:
        return self.context.work / f"logits{index:04d}.safetensors"


@dataclass(frozen=True)
class Predictions:
    """How two models predict the same answer, one value per token of it.

    Attributes:
        kl: KL(reference || candidate) of the next-token distributions, nats.
        logprob_change: |log p candidate - log p reference| of the token that stands there.
        probability: p candidate of that token.
        agreement: Whether both find the same token most likely.
    """

    kl: tuple[float, ...]
    logprob_change: tuple[float, ...]
    probability: tuple[float, ...]
    agreement: tuple[bool, ...]


def compare_predictions(reference: torch.Tensor, candidate: torch.Tensor, answer: Sequence[int]) -> Predictions:
    """Compare two models' finite logits (tokens, vocabulary) at every token of an answer."""
    import torch

    kl: list[float] = []
    change: list[float] = []
    probability: list[float] = []
    tokens = torch.tensor(answer)[:, None]
    for start in range(0, len(answer), _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        ours, theirs = (logits[part].double().log_softmax(dim=-1) for logits in (reference, candidate))
        kl += (ours.exp() * (ours - theirs)).sum(dim=-1).clamp(min=0).tolist()
        own = theirs.gather(1, tokens[part])[:, 0]
        change += (own - ours.gather(1, tokens[part])[:, 0]).abs().tolist()
        probability += own.exp().tolist()
    same = reference.argmax(dim=-1) == candidate.argmax(dim=-1)
    return Predictions(tuple(kl), tuple(change), tuple(probability), tuple(same.tolist()))


def first_difference(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    """Return the index of the first token in which two answers differ, None if they are the same."""
    for index, (ours, theirs) in enumerate(zip(reference, candidate, strict=False)):
        if ours != theirs:
            return index
    return None if len(reference) == len(candidate) else min(len(reference), len(candidate))


def _pieces(processor: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """Return the text that each token adds; of a character of several tokens the last one has it."""
    pieces = []
    known = ""
    for end in range(1, len(tokens) + 1):
        text = processor.decode(tokens[:end])
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens)
        pieces.append("" if unfinished else text[len(known) :])
        known = known if unfinished else text
    return tuple(pieces)
