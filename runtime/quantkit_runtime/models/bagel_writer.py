"""Writing text with BAGEL: its understanding expert reads texts and pictures and goes on.

Shapes: T tokens of a prompt, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.generation.cache import SlotCache
from quantkit_runtime.generation.writer import Inputs, Read, Writer, with_answer
from quantkit_runtime.models.bagel_processor import TEXT_END
from quantkit_runtime.optional import import_optional

if TYPE_CHECKING:
    from quantkit_runtime.models.bagel import Bagel


class BagelWriter(Writer):
    """Writes with a BAGEL; its prompts are those of `BagelProcessor`.

    Args:
        model: The model.
        tokenizer: Of the model.
    """

    defaults: Mapping[str, float] = {"temperature": 0.0}  # as its authors' code does where nothing is asked

    def __init__(self, model: Bagel, tokenizer: Any) -> None:
        self._model = model
        self.ends = frozenset({int(tokenizer.convert_tokens_to_ids(TEXT_END))})
        self.max_context = model.config.text.max_position_embeddings

    def read(self, inputs: Inputs) -> Read:
        """See `Writer.read`."""
        cache = import_optional("transformers").DynamicCache()
        logits = self._logits(inputs, cache)
        shift = int(inputs["positions"][0, -1]) + 1 - inputs["positions"].shape[1]
        return Read(logits[-1], cache, shift)

    def write(self, tokens_B1: Tensor, positions_B1: Tensor, mask_B11S: Tensor, cache: SlotCache) -> Tensor:  # noqa: N803  (shape suffix)
        """See `Writer.write`."""
        language = self._model.language_model
        hidden_B1C = language.model(  # noqa: N806  (shape suffix)
            language.model.embed_tokens(tokens_B1), positions=positions_B1, attention_mask=mask_B11S, cache=cache
        )
        logits_BV: Tensor = language.lm_head(hidden_B1C[:, -1])  # noqa: N806  (shape suffix)
        return logits_BV

    def predict(self, inputs: Inputs, answer: Sequence[int]) -> Tensor:
        """See `Writer.predict`."""
        longer = with_answer(inputs, answer)
        count = len(answer) - 1
        first = int(inputs["positions"][0, -1]) + 1
        more = torch.arange(first, first + count, device=inputs["positions"].device)
        longer["positions"] = torch.cat([inputs["positions"], more[None]], dim=1)
        for name in ("pictures", "is_patch"):
            longer[name] = functional.pad(inputs[name], (0, count))
        return self._logits(longer, None, len(answer))

    def _logits(self, inputs: Inputs, cache: Any, count: int = 1) -> Tensor:
        """Read a prompt; return the logits (count, vocabulary) after its last tokens."""
        language = self._model.language_model
        device = language.lm_head.weight.device
        here = {name: value.to(device) for name, value in inputs.items()}
        embedded_1TC = language.model.embed_tokens(here["input_ids"])  # noqa: N806  (shape suffix)
        pictures_1T, is_patch = here["pictures"], here["is_patch"]  # noqa: N806  (shape suffix)
        for number in range(1, int(pictures_1T.max()) + 1):
            # Of all patches, in the order of the tokens they stand for.
            own = pictures_1T[is_patch] == number
            embedded_1TC[is_patch & (pictures_1T == number)] = self._model.embed_picture(
                here["patches"][own], here["patch_positions"][own]
            )
        hidden_1TC = language.model(  # noqa: N806  (shape suffix)
            embedded_1TC, positions=here["positions"], attention_mask=_mask(pictures_1T), cache=cache
        )
        logits: Tensor = language.lm_head(hidden_1TC[0, -count:])
        return logits


def _mask(pictures_1T: Tensor) -> Tensor | None:  # noqa: N803  (shape suffix)
    """Return what each token may look at, (1, 1, T, T): what is before it, and all of its own picture."""
    if not bool(pictures_1T.any()):
        return None
    count = pictures_1T.shape[1]
    before = torch.ones(count, count, dtype=torch.bool, device=pictures_1T.device).tril()
    same = (pictures_1T[:, :, None] == pictures_1T[:, None]) & (pictures_1T > 0)[:, None]
    return (before | same)[:, None]
