"""Turns the messages of a chat into what the engine takes: media fetched, decoded, counted against the limits."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_runtime.server.chat_schemas import (
    AudioContent,
    AudioUrlContent,
    ChatBody,
    ImageContent,
    SpeechBody,
    TextContent,
)
from quantkit_runtime.server.errors import bad_request
from quantkit_runtime.server.media import SOUND_RATE, decode_audio, decode_base64, decode_image
from quantkit_runtime.server.protocol import (
    AudioPart,
    ChatRequest,
    ImagePart,
    Message,
    Part,
    SpeechRequest,
    TextPart,
)
from quantkit_runtime.server.remote import TOTAL_S, fetch

if TYPE_CHECKING:
    from quantkit_runtime.server.deployment import Deployment
    from quantkit_runtime.server.settings import Limits, Settings

_DEFAULT_MAX_TOKENS = 1024


def names_urls(body: ChatBody) -> bool:
    """Return whether something of a chat has to be fetched."""
    parts = [part for message in body.messages if isinstance(message.content, list) for part in message.content]
    urls = [part.image_url.url for part in parts if isinstance(part, ImageContent)]
    urls += [part.audio_url.url for part in parts if isinstance(part, AudioUrlContent)]
    return any(not url.startswith("data:") for url in urls)


def chat_request(
    body: ChatBody, deployment: Deployment, settings: Settings, request_id: str, arrived: float
) -> ChatRequest:
    """Return a chat; fetches and decodes, so it is called in a thread.

    Args:
        body: What came.
        deployment: The model.
        settings: Of the server.
        request_id: For the engine.
        arrived: When, by ``time.monotonic``; what is fetched is given up some time after it.

    Raises:
        ApiError: A field is not what model or limits allow.
    """
    info, limits = deployment.info, settings.limits
    for wanted in body.modalities:
        if wanted not in info.outputs:
            raise bad_request(
                f"modalities: {deployment.name} answers with {' and '.join(sorted(info.outputs))}, not {wanted}",
                "modalities", "unsupported_parameter",
            )  # fmt: skip
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request("max_tokens: give either max_tokens or max_completion_tokens", "max_tokens")
    voice = body.audio.voice if body.audio is not None else None
    _check_voice(voice, deployment, "audio.voice")
    reader = _Reader(
        deployment,
        settings,
        limits.max_upload_pixels,
        limits.max_audio_s,
        limits.max_prompt_chars,
        arrived + min(TOTAL_S, limits.request_timeout_s),
    )
    return ChatRequest(
        id=request_id,
        messages=tuple(
            Message(
                "system" if message.role == "developer" else message.role,
                tuple(reader.read(message.content, f"messages.{index}.content")),
            )
            for index, message in enumerate(body.messages)
        ),
        max_tokens=_max_tokens(body, deployment, limits),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=body.seed if body.seed is not None else secrets.randbits(31),
        modalities=tuple(dict.fromkeys(body.modalities)),
        voice=voice,
    )


def speech_request(body: SpeechBody, deployment: Deployment, settings: Settings, request_id: str) -> SpeechRequest:
    """Return a speech.

    Raises:
        ApiError: A field is not what model or limits allow.
    """
    limits = settings.limits
    if len(body.input) > limits.max_prompt_chars:
        raise bad_request(f"input: at most {limits.max_prompt_chars} characters", "input")
    _check_voice(body.voice, deployment, "voice")
    return SpeechRequest(
        id=request_id,
        text=body.input,
        voice=body.voice,
        seed=body.seed if body.seed is not None else secrets.randbits(31),
        max_tokens=limits.max_tokens,
    )


def _check_voice(voice: str | None, deployment: Deployment, param: str) -> None:
    voices = deployment.info.voices
    if voice is not None and voice.lower() not in map(str.lower, voices):
        raise bad_request(f"{param}: unknown; {deployment.name} has {', '.join(voices) or 'none'}", param)


def _max_tokens(body: ChatBody, deployment: Deployment, limits: Limits) -> int:
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    asked = getattr(body, param)
    if asked is None:
        return min(int(deployment.default("max_tokens") or _DEFAULT_MAX_TOKENS), limits.max_tokens)
    if asked > limits.max_tokens:
        raise bad_request(f"{param}: at most {limits.max_tokens}, not {asked}", param)
    return int(asked)


@dataclass
class _Reader:
    """Reads contents; what is left of each limit shrinks over the whole conversation."""

    deployment: Deployment
    settings: Settings
    pixels: int
    audio_s: float
    chars: int
    deadline: float

    def read(
        self, content: str | list[TextContent | ImageContent | AudioContent | AudioUrlContent] | None, param: str
    ) -> list[Part]:
        """Return the parts of one message."""
        assert content is not None  # the schema has put something in its place
        if isinstance(content, str):
            return [self._text(content)]
        return [self._part(part, f"{param}.{index}") for index, part in enumerate(content)]

    def _part(self, part: TextContent | ImageContent | AudioContent | AudioUrlContent, param: str) -> Part:
        if isinstance(part, TextContent):
            return self._text(part.text)
        if isinstance(part, ImageContent):
            return self._image(part.image_url.url, f"{param}.image_url.url")
        if isinstance(part, AudioContent):
            return self._audio(part.input_audio.data, f"{param}.input_audio.data", is_url=False)
        return self._audio(part.audio_url.url, f"{param}.audio_url.url", is_url=True)

    def _text(self, text: str) -> TextPart:
        self.chars -= len(text)
        if self.chars < 0:
            most = self.settings.limits.max_prompt_chars
            raise bad_request(f"messages: at most {most} characters in all", "messages")
        return TextPart(text)

    def _image(self, url: str, param: str) -> ImagePart:
        self._check_takes("image", param)
        pixels = decode_image(self._bytes(url, param), self.settings.limits, param, max_pixels=self.pixels)
        self.pixels -= pixels.shape[0] * pixels.shape[1]
        return ImagePart(pixels)

    def _audio(self, text: str, param: str, *, is_url: bool) -> AudioPart:
        self._check_takes("audio", param)
        limits = self.settings.limits
        data = self._bytes(text, param) if is_url else decode_base64(text, limits, param)
        samples = decode_audio(data, limits, param, max_s=self.audio_s)
        self.audio_s -= samples.size / SOUND_RATE
        return AudioPart(samples, SOUND_RATE)

    def _check_takes(self, medium: str, param: str) -> None:
        if medium not in self.deployment.info.inputs:
            raise bad_request(f"{param}: {self.deployment.name} takes no {medium}", param, "unsupported_parameter")

    def _bytes(self, url: str, param: str) -> bytes:
        limits = self.settings.limits
        if url.startswith("data:"):
            return decode_base64(url, limits, param)
        if not self.settings.allow_remote_media:
            raise bad_request(
                f"{param}: send the data itself, as data:...;base64,...; this server fetches no URLs",
                param, "remote_media_disabled",
            )  # fmt: skip
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            most = min(TOTAL_S, limits.request_timeout_s)
            raise bad_request(f"{param}: the URLs of this request take more than {most:g} s", param, "fetch_failed")
        return fetch(url, limits.max_upload_bytes, param, left_s)
