"""Chat: greedy answers, and how both models predict the reference's answer token by token.

Free answers part ways at the first token in doubt and say little from there on. So the candidate also reads the
reference's answer, and its prediction of every next token is held against the reference's own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.compare.result import AnswerOutput
from quantkit.compare.shots import StepCallback
from quantkit.compare.tasks.base import Context, Score, Task, load_with

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
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    logits: torch.Tensor
    step_ms: tuple[float, ...]
    total_s: float


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

        shot = self.context.shots[index]
        family = self.context.family
        generator = family.writer(model.model)
        inputs = family.ask(model.processor, shot.prompt).to(self.context.device)
        count = inputs["input_ids"].shape[1]
        clock = _Clock(self.context.synchronize, on_step, int(self.context.call_kwargs["max_new_tokens"]))
        started = time.perf_counter()
        with torch.inference_mode():
            written = generator.generate(
                **inputs, **self.context.call_kwargs, do_sample=False, num_beams=1, stopping_criteria=[clock]
            )
            total_s = time.perf_counter() - started
            tokens = tuple(written[0, count:].tolist())
            kept = self._kept.get(index)
            logits = _predictions(generator, inputs, kept.tokens if kept is not None else tokens)
        return Answer(tokens, _pieces(model.processor, tokens), logits, tuple(clock.step_ms), total_s)

    def failure(self, recording: Answer) -> str | None:
        """Name the first token whose prediction is not finite."""
        finite = recording.logits.isfinite().all(dim=1)
        if bool(finite.all()):
            return None
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


class _Clock:
    """A stopping criterion of transformers' generation that never stops it, but times every token."""

    def __init__(self, synchronize: Callable[[], None], on_step: StepCallback, limit: int) -> None:
        self._synchronize = synchronize
        self._on_step = on_step
        self._limit = limit
        self._count = 0
        self._last = 0.0
        self.step_ms: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        import torch

        self._synchronize()
        now = time.perf_counter()
        if self._count:
            self.step_ms.append((now - self._last) * 1e3)
        self._count += 1
        self._on_step(self._count, self._limit)
        self._last = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _predictions(model: Any, inputs: Any, answer: Sequence[int]) -> torch.Tensor:
    """Return the logits (len(answer), vocabulary) from which each token of the answer would be chosen."""
    import torch

    prompt = inputs["input_ids"]
    # The last token of the answer predicts what follows it, which is of no interest.
    read = torch.tensor([answer[:-1]], dtype=prompt.dtype, device=prompt.device)
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([prompt, read], dim=1)
    if "attention_mask" in longer:
        mask = longer["attention_mask"]
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(read.shape)], dim=1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        longer["logits_to_keep"] = len(answer)
    logits: torch.Tensor = model(**longer, use_cache=False).logits
    return logits[0, -len(answer) :].cpu()


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
