"""Tuning with auto-round in a process of its own, seen from outside.

auto-round patches transformers when it is imported, ends the interpreter on some errors, and reports success in
cases where it did nothing. So it runs as a child (`quantkit.quantize.autoround`) that is given a `Job` as a file
and leaves the packed layers of each block (`quantkit.quantize.resume`); `tune` starts it, follows it and turns
every way it can fail into a `QuantizationError`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantizationError
from quantkit.quantize.progress import OnProgress, Progress
from quantkit.quantize.resume import TunedBlocks
from quantkit.recipe.conversations import Conversation
from quantkit.recipe.prompts import Prompt

_LOG_TAIL_LINES = 30


@dataclass(frozen=True)
class Layer:
    """One Linear and the scheme it is tuned for; 16 bits leave it alone."""

    bits: int
    group_size: int
    sym: bool


@dataclass(frozen=True)
class Job:
    """All that the child needs to know.

    Attributes:
        source: Folder of the 16-bit model.
        family: Its family's name.
        layers: For each component, every Linear inside its blocks.
        block_lists: For each component, the module lists that hold its blocks.
        default: The scheme of layers that are nothing special.
        prompts: One calibration image, video, text or conversation each; empty if ``dataset`` is given.
        dataset: Name of a data set that auto-round downloads.
        nsamples: Calibration images, texts or conversations.
        seqlen: Tokens at most in a text or conversation.
        call_kwargs: Of the pipeline, without prompt and generator; empty for a language model.
        iters: Steps of signed gradient descent per block.
        lr: Learning rate of the rounding; None is 1 / iters.
        minmax_lr: Learning rate of the clipping range; None is lr.
        batch_size: Cached inputs per step.
        seed: Of the tuning; calibration image i starts from noise of seed ``noise_seed + i``.
        noise_seed: See ``seed``.
        devices: E.g. ``["cpu"]`` or ``["cuda:0"]``.
        cache_on_host: Keep cached inputs in the host's memory instead of the device's.
        memory_keys: Keys of the recipe by which tuning takes less of the devices' memory.
    """

    source: str
    family: str
    layers: Mapping[str, Mapping[str, Layer]]
    block_lists: Mapping[str, list[str]]
    default: Layer
    prompts: list[Prompt | Conversation]
    dataset: str | None
    nsamples: int
    seqlen: int
    call_kwargs: Mapping[str, Any]
    iters: int
    lr: float | None
    minmax_lr: float | None
    batch_size: int
    seed: int
    noise_seed: int
    devices: list[str]
    cache_on_host: bool
    memory_keys: list[str]

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job that `tune` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data["default"] = Layer(**data["default"])
        data["prompts"] = [Prompt(**sample) if isinstance(sample, dict) else sample for sample in data["prompts"]]
        data["layers"] = {
            component: {name: Layer(**layer) for name, layer in layers.items()}
            for component, layers in data["layers"].items()
        }
        return cls(**data)


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared error of one block's output on calibration inputs: rounded to nearest, and after tuning.

    Each is measured on the inputs of one step, not on all, so a block's two figures are of different inputs.
    """

    component: str
    block: str
    before: float
    after: float


@dataclass(frozen=True)
class Tuned:
    """A finished tuning.

    Attributes:
        losses: Of every block, in the order of tuning.
        resumed: How many of the blocks an earlier run had tuned.
        cached_nbytes: Of the inputs that calibration collected, for the component with the most.
    """

    losses: list[BlockLoss]
    resumed: int
    cached_nbytes: int


def tune(job: Job, blocks: TunedBlocks, work: Path, on_progress: OnProgress) -> Tuned:
    """Run a job in a child process.

    Args:
        job: What to tune.
        blocks: Gets each block as it is tuned; those that are there already are not tuned again.
        work: Folder for the job's files and log.
        on_progress: Told of calibration images and of tuned blocks.

    Raises:
        QuantizationError: If the child fails in any way; the end of its log is in the error's notes.
    """
    job_path, log_path = work / "job.json", work / "autoround.log"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    losses: list[BlockLoss] = []
    resumed = cached_nbytes = 0
    failure: str | None = None
    reader, writer = os.pipe()
    with log_path.open("wb") as log, os.fdopen(reader, encoding="utf-8") as events:
        # The child watches its standard input: when this process dies, however, the pipe closes and it ends.
        child = subprocess.Popen(
            [sys.executable, "-m", "quantkit.quantize.autoround", str(job_path), str(blocks.folder), str(writer)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
        )
        os.close(writer)
        try:
            for line in events:
                event = json.loads(line)
                match event.pop("kind"):
                    case "progress":
                        on_progress(Progress(**event))
                    case "tuned":
                        resumed += event.pop("resumed")
                        if event["before"] is not None:
                            losses.append(BlockLoss(**event))
                    case "cached":
                        cached_nbytes = max(cached_nbytes, event["nbytes"])
                    case "failed":
                        failure = _advise(job) if event["out_of_memory"] else event["reason"]
            code = child.wait()
        finally:
            child.kill()
            child.communicate()  # waits, and closes the pipe it watched
    if failure is None and code != 0:
        failure = f"its process ended with code {code}" + (f", perhaps {_advise(job)}" if code == -9 else "")
    if failure is not None:
        error = QuantizationError(f"auto-round failed: {failure}")
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        error.add_note("The end of auto-round's log:\n" + "\n".join(tail))
        raise error
    return Tuned(losses, resumed, cached_nbytes)


def _advise(job: Job) -> str:
    """Say what to do about a device that is too small."""
    elsewhere = "" if job.devices == ["cpu"] else ", or give --device cpu"
    return f"out of memory on {', '.join(job.devices)}; lower {' or '.join(job.memory_keys)}{elsewhere}"
