"""From the messages of a request to a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit_runtime.architecture import is_own
from quantkit_runtime.checkpoint import read_json
from quantkit_runtime.generation.text import load_processor, tokenizer_of
from quantkit_runtime.models.bagel_processor import BagelProcessor
from quantkit_runtime.optional import import_optional
from quantkit_runtime.server.models.base import RequestRefusedError
from quantkit_runtime.server.protocol import AudioPart, ImagePart, Message, TextPart

_LOUDEST = 1e6  # samples are in [-1, 1]; the squares of larger ones overflow


class Reader:
    """Turns conversations into inputs with the processor or tokenizer of a model.

    Args:
        folder: Of the model.

    Attributes:
        tokenizer: Turns tokens into text.
        inputs: Media that it reads beside text: ``image``, ``audio``.
        audio_rate: Samples per second that it takes.
    """

    def __init__(self, folder: Path) -> None:
        self._processor: Any = _processor_of(folder)
        self.tokenizer: Any = tokenizer_of(self._processor)
        self._listener: Any = getattr(self._processor, "feature_extractor", None)
        sees = isinstance(self._processor, BagelProcessor) or hasattr(self._processor, "image_processor")
        self.inputs = frozenset(
            name for name, is_read in (("image", sees), ("audio", self._listener is not None)) if is_read
        )
        self.audio_rate = int(self._listener.sampling_rate) if self._listener is not None else 0

    def read(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the inputs of a conversation that the model is to go on with, a batch of one on the CPU.

        Raises:
            RequestRefusedError: It holds what this model cannot read, or its template refuses it.
        """
        parts = [part for message in messages for part in message.parts]
        images = [self._image(part) for part in parts if isinstance(part, ImagePart)]
        audio = [self._audio(part) for part in parts if isinstance(part, AudioPart)]
        if isinstance(self._processor, BagelProcessor):
            pictures = iter(images)
            return self._processor([part.text if isinstance(part, TextPart) else next(pictures) for part in parts])
        text = self._prompt(messages)
        try:
            if self._processor is self.tokenizer:
                # The template has written the tokens that begin a text, if there are any.
                read = self.tokenizer(text, return_tensors="pt", add_special_tokens=self._has_no_template)
            else:
                read = self._processor(text=text, images=images or None, audio=audio or None, return_tensors="pt")
        except ValueError as error:  # e.g. a picture that is 1 pixel high
            raise RequestRefusedError(f"messages: {error}", "messages") from error
        if audio:
            self._check_heard(audio, read)
        return {name: value for name, value in read.items() if name != "token_type_ids"}

    @property
    def _has_no_template(self) -> bool:
        return getattr(self._processor, "chat_template", None) is None

    def _prompt(self, messages: Sequence[Message]) -> str:
        if self._has_no_template:
            return "\n".join(part.text for one in messages for part in one.parts if isinstance(part, TextPart))
        as_parts = self._processor is not self.tokenizer
        conversation = [
            {"role": one.role, "content": [_named(part) for part in one.parts] if as_parts else _text(one)}
            for one in messages
        ]
        try:
            prompt: str = self._processor.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except import_optional("jinja2").TemplateError as error:
            raise RequestRefusedError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        return prompt

    def _image(self, part: ImagePart) -> Any:
        if "image" not in self.inputs:
            raise RequestRefusedError("messages: this model cannot see pictures", "messages")
        return import_optional("PIL.Image").fromarray(part.pixels)

    def _audio(self, part: AudioPart) -> Any:
        if "audio" not in self.inputs:
            raise RequestRefusedError("messages: this model cannot hear", "messages")
        if part.rate != self.audio_rate:
            raise RequestRefusedError(
                f"messages: sound has {part.rate} samples a second; this model takes {self.audio_rate}", "messages"
            )
        least = self._listener.n_fft // 2 + 1  # the first window reaches so far
        if part.samples.size < least:
            raise RequestRefusedError(
                f"messages: sound of {part.samples.size} samples; at least {least}", "messages"
            )
        if not np.abs(part.samples).max() < _LOUDEST:  # nor is what is no number
            raise RequestRefusedError(
                "messages: sound with samples that are not finite or far too large", "messages"
            )
        return part.samples

    def _check_heard(self, audio: Sequence[np.ndarray], read: Mapping[str, Any]) -> None:
        """Refuse sounds of which the processor has cut off the end: some do beyond their window, without a word."""
        frames = read["feature_attention_mask"].sum(1).tolist()
        for samples, heard in zip(audio, frames, strict=True):
            if (heard + 1) * self._listener.hop_length < samples.size:
                raise RequestRefusedError(
                    f"messages: sound of {samples.size / self.audio_rate:.1f} s; this model hears at most "
                    f"{self._listener.n_samples / self.audio_rate:g} s",
                    "messages",
                )


def _processor_of(folder: Path) -> Any:
    """Return the processor of a model, or its tokenizer if it reads text alone.

    Raises:
        CheckpointFormatError: The folder holds none that can be loaded.
    """
    if is_own(read_json(folder / "config.json")):
        return BagelProcessor(folder)
    transformers = import_optional("transformers")
    is_multimodal = any((folder / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))
    auto = transformers.AutoProcessor if is_multimodal else transformers.AutoTokenizer
    return load_processor(auto, folder)


def _named(part: TextPart | ImagePart | AudioPart) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": ""} if isinstance(part, ImagePart) else {"type": "audio", "audio": ""}


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
