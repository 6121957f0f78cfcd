"""What `Batch` asks of a model that writes text, and how the models of transformers give it.

Shapes: B answers, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.generation.cache import SlotCache
from quantkit_runtime.optional import import_optional

Inputs = Mapping[str, Tensor]
"""A prompt as its model's processor makes it: a batch of one, with ``input_ids`` (1, T)."""


@dataclass(frozen=True)
class Read:
    """A prompt that a model has read.

    Attributes:
        logits_V: Of the token that follows it.
        cache: Its keys and values, as transformers keeps them.
        position_shift: The position of the next token, less the number of tokens before it: a picture has fewer
            positions than tokens.
    """

    logits_V: Tensor  # noqa: N815  (shape suffix)
    cache: Any
    position_shift: int = 0


class Writer(ABC):
    """A model that writes text.

    Attributes:
        ends: Tokens that end an answer.
        max_context: Tokens that prompt and answer may have together.
        defaults: Of how its authors want it to write, what they say: ``temperature``, ``top_p``, ``top_k``,
            ``repetition_penalty``.
    """

    ends: frozenset[int]
    max_context: int
    defaults: Mapping[str, float]

    @abstractmethod
    def read(self, inputs: Inputs) -> Read:
        """Read a prompt; its tensors may be anywhere."""

    @abstractmethod
    def write(self, tokens_B1: Tensor, positions_B1: Tensor, mask_B11S: Tensor, cache: SlotCache) -> Tensor:  # noqa: N803  (shape suffix)
        """Add a token to each of several answers; return the logits (B, V) of those that follow.

        Args:
            tokens_B1: Of the answers, int64.
            positions_B1: Of these tokens, int64.
            mask_B11S: What of the cache they may attend to, bool.
            cache: Of the answers; takes the keys and values of these tokens.
        """

    @abstractmethod
    def predict(self, inputs: Inputs, answer: Sequence[int]) -> Tensor:
        """Return the logits (len(answer), V) from which each token of a given answer would be chosen."""


def writer_of(model: Any, tokenizer: Any) -> Writer:
    """Return what writes with a model, of omni models with its thinker.

    Args:
        model: From `load_model`.
        tokenizer: Of the model.

    Raises:
        CheckpointFormatError: It writes no text, or cannot write several answers at once.
    """
    make = getattr(model, "make_writer", None)
    if make is not None:  # a model of this package
        writer: Writer = make(tokenizer)
        return writer
    return TransformersWriter(getattr(model, "thinker", model), tokenizer)


class TransformersWriter(Writer):
    """A transformers model that has ``generate``, in evaluation mode.

    Args:
        model: The model; of omni models, the thinker.
        tokenizer: Of the model.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not hasattr(model, "generate") or model.get_output_embeddings() is None:
            raise CheckpointFormatError(f"{type(model).__name__}: writes no text")
        self._model = model
        self._reader = getattr(model, model.base_model_prefix)
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._adds_masks = _adds_masks(self._decoder.config)
        self.ends = end_tokens(model, tokenizer)
        self.max_context = _max_context(model)
        self.defaults = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(model.generation_config, name, None)) is not None
        }

    def read(self, inputs: Inputs) -> Read:
        """See `Writer.read`."""
        cache = import_optional("transformers").DynamicCache(config=self._decoder.config)
        hidden_1TH = self._reader(  # noqa: N806  (shape suffix)
            **self._here(inputs), past_key_values=cache, use_cache=True
        ).last_hidden_state
        shift = getattr(self._reader, "rope_deltas", None)  # an image has fewer positions than tokens
        return Read(self._head(hidden_1TH[:, -1:])[0, -1], cache, 0 if shift is None else int(shift.reshape(-1)[0]))

    def write(self, tokens_B1: Tensor, positions_B1: Tensor, mask_B11S: Tensor, cache: SlotCache) -> Tensor:  # noqa: N803  (shape suffix)
        """See `Writer.write`."""
        mask = mask_B11S
        if self._adds_masks:
            lowest = torch.finfo(self._head.weight.dtype).min
            mask = torch.zeros_like(mask, dtype=self._head.weight.dtype).masked_fill(~mask, lowest)
        hidden_B1H = self._decoder(  # noqa: N806  (shape suffix)
            input_ids=tokens_B1,
            attention_mask=mask,
            position_ids=positions_B1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits_BV: Tensor = self._head(hidden_B1H)[:, -1]  # noqa: N806  (shape suffix)
        return logits_BV

    def predict(self, inputs: Inputs, answer: Sequence[int]) -> Tensor:
        """See `Writer.predict`."""
        longer = with_answer(self._here(inputs), answer)
        more: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            more["logits_to_keep"] = len(answer)
        logits: Tensor = self._model(**longer, **more, use_cache=False).logits
        return logits[0, -len(answer) :]

    def _here(self, inputs: Inputs) -> dict[str, Tensor]:
        device = self._head.weight.device
        return {name: value.to(device) for name, value in inputs.items()}


def with_answer(inputs: Inputs, answer: Sequence[int]) -> dict[str, Tensor]:
    """Return a prompt followed by an answer without its last token, whose prediction is of no interest."""
    prompt = inputs["input_ids"]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([prompt, prompt.new_tensor([answer[:-1]])], dim=1)
    if "attention_mask" in longer:
        mask = longer["attention_mask"]
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(1, len(answer) - 1)], dim=1)
    return longer


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the generation configuration's, else the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
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


def _max_context(model: Any) -> int:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise CheckpointFormatError(
            f"config.json: layer_types: {', '.join(sorted(kinds))}: answers cannot be written with other than "
            "attention layers"
        )
    longest = int(config.max_position_embeddings)
    # Inside its window a sliding layer is a full one; further it would need a mask of its own.
    return min(longest, int(config.sliding_window)) if "sliding_attention" in kinds else longest
