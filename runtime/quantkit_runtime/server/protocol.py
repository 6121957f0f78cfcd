"""What the HTTP process and the engine say to each other: plain dataclasses, sent over private pipes.

A request is complete: defaults are filled in, seeds are drawn, media are decoded. So it can be run again after a
crash with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Kind = Literal["image", "video", "chat", "speech"]


@dataclass(frozen=True)
class ModelSpec:
    """What an engine loads.

    Attributes:
        path: Folder or hub id.
        device: Device type, of which each rank takes its own; with a number, all ranks share that one.
        dtype: Name of a torch dtype, such as ``bfloat16``.
        compute: As `load_pipeline` takes it.
        backend: As `load_pipeline` takes it.
        compile: Likewise.
        cuda_graphs: Likewise.
        cfg_parallel: Ranks that share the guidance branches: 1 or 2.
        tensor_parallel: Ranks that share each layer.
        max_batch: Pictures or chats that run together, where the model allows several; None is its own default.
        loader: ``module:function`` that makes the model of this spec.
        exact: Chats do not depend on what is written beside them, not even in rounding; see `generation.Batch`.
        warm_up: Run something small before the model counts as ready.
        defaults: Values of request fields, before the model's own.
    """

    path: str
    device: str = "cpu"
    dtype: str = "bfloat16"
    compute: str = "auto"
    backend: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    cfg_parallel: int = 1
    tensor_parallel: int = 1
    max_batch: int | None = None
    loader: str = "quantkit_runtime.server.models.loader:load"
    exact: bool = False
    warm_up: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Number of processes of the engine."""
        return self.cfg_parallel * self.tensor_parallel


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model can do; the HTTP process validates requests against it.

    Attributes:
        kinds: Of requests that it takes.
        parameters: Names of request fields that it understands.
        defaults: Values of fields that a request may leave out.
        inputs: Media that a chat takes beside text: ``image``, ``audio``.
        outputs: Of a chat: ``text``, ``audio``.
        voices: Of speech.
        draws_from_image: A picture or video may begin with a picture.
        needs_image: It draws from a picture and takes no request without one.
        size_multiple: Width and height must be multiples of it.
        max_batch: Pictures in one run, or chats and speeches at once (the engine admits them while others run, and
            one request for pictures beside them); 1 where requests cannot run together.
        description: Class and similar, for logs.
    """

    kinds: frozenset[Kind]
    parameters: frozenset[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    voices: tuple[str, ...] = ()
    draws_from_image: bool = False
    needs_image: bool = False
    size_multiple: int = 1
    max_batch: int = 1
    description: str = ""


@dataclass(frozen=True)
class ImageRequest:
    """Pictures from one prompt: picture i has the seed ``seeds[i]`` whatever else runs with it."""

    id: str
    prompt: str
    seeds: tuple[int, ...]
    width: int
    height: int
    options: dict[str, Any] = field(default_factory=dict)  # by the pipeline's own names, e.g. guidance_scale
    negative_prompt: str | None = None
    image: np.ndarray | None = None  # uint8 (height, width, 3)

    @property
    def items(self) -> int:
        """Number of pictures."""
        return len(self.seeds)

    def batch_key(self) -> tuple[Any, ...] | None:
        """Requests of one key may run together; None runs alone."""
        if self.image is not None:
            return None
        size = (self.width, self.height, self.negative_prompt is None)
        return ("image", *size, *sorted(self.options.items()))


@dataclass(frozen=True)
class VideoRequest:
    """One video."""

    id: str
    prompt: str
    seed: int
    width: int
    height: int
    num_frames: int
    fps: int
    options: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    image: np.ndarray | None = None

    @property
    def items(self) -> int:
        """A video runs alone."""
        return 1

    def batch_key(self) -> None:
        """Videos never run together: one fills a device."""


@dataclass(frozen=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture of a message: uint8 (height, width, 3)."""

    pixels: np.ndarray


@dataclass(frozen=True)
class AudioPart:
    """Sound of a message: float32 (samples,), one channel."""

    samples: np.ndarray
    rate: int


Part = TextPart | ImagePart | AudioPart


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ChatRequest:
    """An answer to a conversation; unset sampling values are the model's own."""

    id: str
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    modalities: tuple[str, ...] = ("text",)
    voice: str | None = None

    @property
    def items(self) -> int:
        """One answer."""
        return 1

    def batch_key(self) -> None:
        """The engine itself admits it while others run."""


@dataclass(frozen=True)
class SpeechRequest:
    """Text to be read aloud."""

    id: str
    text: str
    voice: str | None = None
    seed: int = 0
    max_tokens: int = 4096

    @property
    def items(self) -> int:
        """One speech."""
        return 1

    def batch_key(self) -> None:
        """The engine itself admits it while others run."""


Request = ImageRequest | VideoRequest | ChatRequest | SpeechRequest


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Frames:
    """Pictures: uint8 (count, height, width, 3)."""

    pixels: np.ndarray


@dataclass(frozen=True)
class Answer:
    """The end of a chat or speech; its text and sound came as `Delta` before."""

    finish_reason: Literal["stop", "length"]
    usage: Usage


# Events of one request. Exactly one Finished or Failed ends it.


@dataclass(frozen=True)
class Progress:
    """A denoising step is done."""

    id: str
    step: int
    steps: int
    step_s: float


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text, tokens it took, sound as float32 (samples,) with its rate."""

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    samples: np.ndarray | None = None
    rate: int = 0


@dataclass(frozen=True)
class Finished:
    """The result of a request."""

    id: str
    result: Frames | Answer
    seconds: float
    peak_memory_bytes: int


FailureKind = Literal["refused", "out_of_memory", "cancelled", "timeout", "engine_down", "stopped", "internal"]


@dataclass(frozen=True)
class Failed:
    """A request has no result.

    ``refused`` is the caller's mistake, with a message for them; ``param`` names the field where it is known.
    """

    id: str
    kind: FailureKind
    message: str
    param: str | None = None


Event = Progress | Delta | Finished | Failed


# To the engine.


@dataclass(frozen=True)
class Run:
    """Run these together (pictures), or admit them (chat)."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Cancel:
    """Stop a request at its next step; it still ends with one event."""

    id: str


@dataclass(frozen=True)
class Ping:
    """Answer with `Pong`."""


@dataclass(frozen=True)
class Stop:
    """End the process after what runs now."""


# From the engine.


@dataclass(frozen=True)
class Pong:
    """The process is alive; ``active`` is how many requests it holds."""

    active: int


@dataclass(frozen=True)
class Phase:
    """A part of starting is done: ``import``, ``load`` or ``warm up``."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Ready:
    """The model takes requests."""

    info: ModelInfo


@dataclass(frozen=True)
class StartFailed:
    """The model cannot be loaded, or the ranks cannot go on; ``is_mistake`` when starting again cannot help."""

    message: str
    is_mistake: bool
