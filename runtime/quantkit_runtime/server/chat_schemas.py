"""Bodies of chats and speeches, as OpenAI and vLLM have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from quantkit_runtime.server.schemas import Seed, Strict

AudioFormat = Literal["wav", "pcm16", "mp3", "flac", "opus"]
SpeechFormat = Literal["wav", "pcm", "mp3", "flac", "opus"]


class TextContent(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class Url(Strict):
    """Where a picture or sound is: ``data:...;base64,...``, or http(s) where the server allows it."""

    url: str
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted for all models, used by none")


class ImageContent(Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Url


class AudioData(Strict):
    """A sound in base64; what it is is read from its first bytes."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus"] = "wav"


class AudioContent(Strict):
    """A sound of a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class AudioUrl(Strict):
    """Where a sound is."""

    url: str


class AudioUrlContent(Strict):
    """A sound of a message, by URL."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Content = Annotated[TextContent | ImageContent | AudioContent | AudioUrlContent, Field(discriminator="type")]


class EarlierAudio(Strict):
    """How an earlier answer sounded, as the server told it; nothing is kept, so its transcript stands for it."""

    id: str
    data: str | None = None
    expires_at: int | None = None
    transcript: str | None = None


class MessageBody(Strict):
    """One turn of a conversation; an answer can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    name: str | None = Field(None, max_length=256, description="Accepted for all models, used by none")
    refusal: str | None = None
    audio: EarlierAudio | None = None
    tool_calls: None = None
    function_call: None = None
    annotations: None = None
    content: str | list[Content] | None

    @field_validator("content")
    @classmethod
    def _is_said(cls, content: str | list[Content] | None, others: ValidationInfo) -> str | list[Content] | None:
        """Put what an answer without a text said in its place."""
        if content is not None:
            return content
        audio: EarlierAudio | None = others.data.get("audio")
        said: str | None = audio.transcript if audio is not None else others.data.get("refusal")
        if said is None:
            raise ValueError("is missing, and there is neither a transcript nor a refusal to stand for it")
        return said


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class AudioOptions(Strict):
    """How the answer sounds."""

    voice: str | None = None
    format: AudioFormat = "wav"


class ChatBody(Strict):
    """``POST /v1/chat/completions``; sampling values left out are the model's own."""

    model: str | None = None
    messages: list[MessageBody] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, le=100_000)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    seed: Seed | None = None
    n: int = Field(1, ge=1, le=1)  # Literal[1] would take true
    stream: bool = False
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text", "audio"]] = Field(["text"], min_length=1, max_length=2)
    audio: AudioOptions | None = None
    user: str | None = Field(None, max_length=256)


class SpeechBody(Strict):
    """``POST /v1/audio/speech``."""

    model: str | None = None
    input: str = Field(min_length=1, pattern=r"\S")
    voice: str | None = None
    response_format: SpeechFormat = "mp3"
    seed: Seed | None = None
    user: str | None = Field(None, max_length=256)


class UsageBody(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AudioAnswer(BaseModel):
    """The answer as sound, in base64."""

    id: str
    data: str
    expires_at: int
    transcript: str


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    audio: AudioAnswer | None = None


class Choice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


def chunk(
    identity: str, created: int, model: str, delta: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    """Return a piece of a streamed answer; without a delta one that has no choices, for the usage."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": identity, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices
    }  # fmt: skip
