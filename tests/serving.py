"""Servers for tests: the real HTTP process and engine processes, with models that cost nothing."""

import asyncio
import base64
import io
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.server.models.base import BatchModel, RequestRefusedError, StreamingModel
from quantkit_runtime.server.protocol import (
    Answer,
    Delta,
    Finished,
    Frames,
    ModelInfo,
    ModelSpec,
    SpeechRequest,
    Usage,
    VideoRequest,
)

STEP_S = 0.02
IMAGES = "/v1/images/generations"


class FakeDiffusion(BatchModel):
    """Draws its seed: the red of every pixel is the seed, the green how many pictures were drawn together.

    Words of the prompt make it fail: ``crash`` kills the process, ``crash-once:FILE`` only if FILE is there (and
    removes it), ``hang`` stops it, ``oom``, ``refuse``, ``fail``, ``fail-alone:FILE`` on the second of two ranks if
    FILE is there (and removes it); ``slow`` takes steps of a tenth of a second.
    """

    def __init__(self, info):
        self.info = info

    def warm_up(self):
        pass

    def run(self, requests, on_step):
        first = requests[0]
        steps = first.options["num_inference_steps"]
        together = sum(request.items for request in requests)
        for step in range(1, steps + 1):
            for request in requests:
                misbehave(request.prompt)
            if any("oom-together" in request.prompt for request in requests) and together > 1:
                raise MemoryError
            time.sleep(0.1 if "slow" in first.prompt else STEP_S)
            on_step(step, steps)
        return [self._frames(request, together) for request in requests]

    def _frames(self, request, together):
        if isinstance(request, VideoRequest):
            return Frames(
                np.full((request.num_frames, request.height, request.width, 3), request.seed % 256, np.uint8)
            )
        pixels = np.zeros((len(request.seeds), request.height, request.width, 3), np.uint8)
        for index, seed in enumerate(request.seeds):
            pixels[index, :, :, 0] = seed % 256
        pixels[:, :, :, 1] = together
        if request.image is not None:
            pixels[:, :, :, 2] = request.image[0, 0, 2]
        return Frames(pixels)


def misbehave(prompt):
    words = prompt.split()
    if "crash" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in words:
        os.kill(os.getpid(), signal.SIGSTOP)
    for word in words:
        name, _, file = word.partition(":")
        if name in ("crash-once", "hang-once") and Path(file).exists():
            Path(file).unlink()
            os.kill(os.getpid(), signal.SIGKILL if name == "crash-once" else signal.SIGSTOP)
        if name == "fail-alone" and is_second_rank() and Path(file).exists():
            Path(file).unlink()
            raise RuntimeError("not on the first rank")
    if "oom" in words:
        raise MemoryError
    if "refuse" in words:
        raise RequestRefusedError("not with me", "prompt")
    if "fail" in words:
        raise RuntimeError("inner secret")


def is_second_rank():
    return os.environ.get("RANK") == "1"


class FakeChat(StreamingModel):
    """Answers with the words of the last message, one a step; says ``image`` and ``audio`` for media.

    ``crash-late`` kills the process at its turn; of two ranks the second writes another token for ``apart``.
    """

    def __init__(self, info):
        self.info = info
        self._left = {}

    @property
    def active(self):
        return len(self._left)

    def warm_up(self):
        pass

    def admit(self, request):
        if isinstance(request, SpeechRequest):
            words = request.text.split()
            misbehave(request.text)
            self._left[request.id] = (request, words, time.perf_counter(), len(words))
            return
        words = []
        for part in request.messages[-1].parts:
            words += (
                part.text.split() if hasattr(part, "text") else ["image" if hasattr(part, "pixels") else "audio"]
            )
        if "refuse" in words:
            raise RequestRefusedError("longer than the context", "messages")
        misbehave(" ".join(words))
        self._left[request.id] = (request, words[: request.max_tokens], time.perf_counter(), len(words))

    def step(self):
        time.sleep(STEP_S)
        events = []
        for identity, (request, words, begin, total) in list(self._left.items()):
            if words:
                word = words.pop(0)
                if word == "crash-late":
                    os.kill(os.getpid(), signal.SIGKILL)
                is_speech = isinstance(request, SpeechRequest)
                sound = is_speech or "audio" in request.modalities
                samples = np.full(240, 0.5, np.float32) if sound else None
                token = 2 if word == "apart" and is_second_rank() else 1
                text = "" if is_speech else f"{word} "
                events.append(Delta(identity, text, (token,), samples, 24_000 if sound else 0))
            else:
                reason = "stop" if total <= request.max_tokens else "length"
                done = Answer(reason, Usage(total, min(total, request.max_tokens)))
                events.append(Finished(identity, done, time.perf_counter() - begin, 0))
                del self._left[identity]
        return events

    def cancel(self, request_id):
        del self._left[request_id]

    def reset(self):
        self._left.clear()


_OPTIONS = frozenset({"num_inference_steps", "guidance_scale", "negative_prompt", "image"})
_DEFAULTS = {"num_inference_steps": 2, "width": 64, "height": 64}


def load_images(_spec):
    return FakeDiffusion(
        ModelInfo(
            frozenset({"image"}), _OPTIONS, _DEFAULTS, size_multiple=16, max_batch=8, description="FakePipeline"
        )
    )


def load_editor(_spec):
    info = load_images(_spec).info
    return FakeDiffusion(replace(info, draws_from_image=True, needs_image=True))


def load_videos(_spec):
    defaults = {**_DEFAULTS, "num_frames": 5, "fps": 16}
    info = ModelInfo(
        frozenset({"video"}), _OPTIONS | {"num_frames"}, defaults, draws_from_image=True, size_multiple=16,
        description="FakePipeline",
    )  # fmt: skip
    return FakeDiffusion(info)


def load_chat(_spec):
    return FakeChat(
        ModelInfo(
            frozenset({"chat", "speech"}),
            frozenset(),
            inputs=frozenset({"image", "audio"}),
            outputs=frozenset({"text", "audio"}),
            voices=("Chelsie",),
            max_batch=4,
            description="FakeChat",
        )
    )


def load_broken(_spec):
    raise RuntimeError("no such weights")


def load_videos_of_file(spec):
    """Load what draws videos as long as the file is there that is the spec's path."""
    if not Path(spec.path).exists():
        raise CheckpointFormatError(f"{spec.path}: missing")
    return load_videos(spec)


def load_slowly(_spec):
    time.sleep(600)


def spec(kind):
    return ModelSpec(path=kind, loader=f"serving:load_{kind}")


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    document: dict
    context: object
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self):
        return next(iter(self.context.deployments.by_name.values())).engine

    @property
    def scheduler(self):
        return next(iter(self.context.deployments.by_name.values())).scheduler


@contextmanager
def running(settings, *, wait=True):
    """Serve in a thread until the end of the block."""
    from quantkit_runtime.server.run import Server, bind

    # The engines find this module by its name.
    found = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(found))
    server = Server(settings)
    context = server.context
    loop = asyncio.new_event_loop()
    with bind(settings) as bound:
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[bound])))
        thread.start()
        try:
            until(lambda: server.started)
            if wait:
                until(lambda: context.started is not None and context.started.done(), 120)
                context.started.result()
            yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", server.config.app.openapi(), context, loop)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not stop"
            loop.close()


def check_documented(answer, document):
    """Check that the OpenAPI document has the status of an answer, if it has the operation."""
    request = answer.request
    # What a client asks for literally wins over a parameter: /v1/videos/sync is no video.
    for path, operations in sorted(document["paths"].items(), key=lambda item: "{" in item[0]):
        operation = operations.get(request.method.lower())
        if operation is not None and re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), request.url.path):
            documented = operation["responses"]
            assert str(answer.status_code) in documented, f"{request.method} {path} answers {answer.status_code}"
            return


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def pixels_of(answer, index=0):
    """Decode a picture of an answer."""
    data = base64.b64decode(answer.json()["data"][index]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def red(answer):
    """Return the seed that the fake drew."""
    return int(pixels_of(answer)[0, 0, 0])


def together(answer):
    """Return how many pictures the fake drew in one run."""
    return int(pixels_of(answer)[0, 0, 1])


def load_with_faults(spec):
    """Load what the spec says, with prompts that run out of memory at their second step."""
    import torch

    from quantkit_runtime.server.models import loader

    model = loader.load(spec)
    run = model.run

    def faulty(requests, on_step):
        def after_step(step, steps):
            if step == 2 and any("oom" in request.prompt for request in requests):
                raise torch.OutOfMemoryError("injected")
            on_step(step, steps)

        return run(requests, after_step)

    model.run = faulty
    return model
