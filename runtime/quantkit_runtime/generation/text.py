"""From tokens to text as they come: whole characters only, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit_runtime.errors import CheckpointFormatError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 4  # decoded again with every new token: some tokenizers put a space between two tokens


def load_processor(auto: Any, folder: Path, **options: Any) -> Any:
    """Return what turns texts into tokens, and maybe pictures and sounds into inputs, from a model's own files.

    Args:
        auto: ``AutoTokenizer`` or ``AutoProcessor`` of transformers.
        folder: Of the model.
        options: More, for ``from_pretrained``.

    Raises:
        CheckpointFormatError: The folder holds none that can be loaded.
    """
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointFormatError(f"{folder}: holds no tokenizer that can be loaded: {reason}") from error


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; one that reads text alone is the tokenizer."""
    return getattr(processor, "tokenizer", processor)


class TextStream:
    """The text of one answer.

    What was handed out is never taken back: the bytes of a character that is not complete are held until it is, and
    so is what may turn out to be the beginning of a stop string.

    Args:
        tokenizer: With ``decode`` as in transformers.
        stop: Strings that end the answer.

    Attributes:
        text: All that was handed out.
        stopped: Whether a stop string was found; nothing comes after it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._known = 0  # characters of their text that are in `_decoded`
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token and return the text that is now certain."""
        self._tokens.append(token)
        window = self._decode(self._tokens[self._start :])
        whole = window.removesuffix(_UNFINISHED)
        new, self._known = whole[self._known :], max(self._known, len(whole))
        if whole == window and len(self._tokens) - self._start > 2 * _CONTEXT_TOKENS:
            self._advance()
        return self._hand_out(new)

    def finish(self) -> str:
        """Return what was held; the answer has ended."""
        window = self._decode(self._tokens[self._start :])
        new, self._known = window[self._known :], len(window)
        return self._hand_out(new, last=True)

    def _advance(self) -> None:
        """Forget all but the last tokens, where that is between two characters."""
        start = len(self._tokens) - _CONTEXT_TOKENS
        context = self._decode(self._tokens[start:])
        if _UNFINISHED not in context:
            self._start, self._known = start, len(context)

    def _hand_out(self, new: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        ready = self._held + new
        found = min((at for stop in self._stop if (at := ready.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            ready = ready[:found]
        else:
            hold = 0 if last else max((_overlap(ready, stop) for stop in self._stop), default=0)
            ready, self._held = ready[: len(ready) - hold], ready[len(ready) - hold :]
        self.text += ready
        return ready

    def _decode(self, tokens: list[int]) -> str:
        decoded: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
