"""How the next token is chosen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

_COLDEST = 1e-4  # float32 has no room for what lower temperatures make of logits


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is written; the defaults are OpenAI's.

    Attributes:
        max_tokens: Of the answer at most.
        temperature: Logits are divided by it; 0, and all but 0, takes the most likely token.
        top_p: Only the most likely tokens that together have this probability are drawn from.
        top_k: Only so many of the most likely tokens are drawn from; 0 is no limit.
        seed: Of this answer's own random numbers; None draws one.
        stop: Strings that end the answer; they are not part of it.
        presence_penalty: Taken from the logit of every token that the answer holds.
        frequency_penalty: Taken from a token's logit once for each time that the answer holds it.
        repetition_penalty: Positive logits of tokens of prompt and answer are divided by it, negative multiplied.
        ignore_eos: Whether to write on to ``max_tokens``; for load tests.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False


@dataclass
class Sampler:
    """Chooses the tokens of one answer.

    Args:
        params: How.
        prompt: Tokens of the prompt.
    """

    params: SamplingParams
    prompt: tuple[int, ...]
    _counts: Counter[int] = field(default_factory=Counter)
    _seen: dict[int, None] = field(default_factory=dict)
    _generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self._seen = dict.fromkeys(self.prompt)
        if self.params.temperature >= _COLDEST:
            self._generator = torch.Generator()
            if self.params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.params.seed)

    def choose(self, logits_V: Tensor) -> int:  # noqa: N803  (shape suffix: V is the vocabulary)
        """Return the next token.

        Args:
            logits_V: Of every token of the vocabulary, on any device in any floating dtype.
        """
        scores = self._penalize(logits_V.float())
        token = int(scores.argmax()) if self._generator is None else self._draw(scores)
        self._counts[token] += 1
        self._seen[token] = None
        return token

    def _penalize(self, scores: Tensor) -> Tensor:
        params = self.params
        if params.repetition_penalty != 1.0 and self._seen:
            seen = torch.tensor(list(self._seen), device=scores.device)
            found = scores[seen]
            factor = params.repetition_penalty
            scores = scores.index_copy(0, seen, torch.where(found < 0, found * factor, found / factor))
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            tokens = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(0, tokens, -(params.presence_penalty + params.frequency_penalty * counts))
        return scores

    def _draw(self, scores: Tensor) -> int:
        params = self.params
        scores = scores / params.temperature
        # Without a limit there is no need for the order; drawn on the CPU, a seed means the same on every device.
        if params.top_k or params.top_p < 1:
            count = min(params.top_k, scores.numel()) if params.top_k else scores.numel()
            scores, order = scores.topk(count)
            probabilities = scores.softmax(dim=0)
            if params.top_p < 1:
                before = probabilities.cumsum(dim=0) - probabilities
                beyond = before >= params.top_p
                beyond[0] = False
                probabilities = probabilities.masked_fill(beyond, 0.0)
            return int(order[self._one_of(probabilities)])
        return self._one_of(scores.softmax(dim=0))

    def _one_of(self, probabilities: Tensor) -> int:
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self._generator))
