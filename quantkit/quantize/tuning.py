"""Tuning with auto-round in a process of its own, seen from outside.

auto-round patches transformers when it is imported, ends the interpreter on some errors, and reports success in
cases where it did nothing. So it runs as a child (`quantkit.quantize.autoround`) that is given a `Job` as a file
and leaves the packed layers as safetensors; `tune` starts it, follows it and turns every way it can fail into a
`QuantizationError`.
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
        default: The scheme of layers that are nothing special.
        prompts: One calibration image, text or conversation each; empty if ``dataset`` is given.
        dataset: Name of a data set that auto-round downloads.
        nsamples: Calibration images or texts.
        seqlen: Tokens at most in a text.
        call_kwargs: Of the pipeline, without prompt and generator; empty for a language model.
        iters: Steps of signed gradient descent per block.
        lr: Learning rate of the rounding; None is 1 / iters.
        minmax_lr: Learning rate of the clipping range; None is lr.
        batch_size: Cached inputs per step.
        seed: Of the tuning; calibration image i starts from noise of seed ``noise_seed + i``.
        noise_seed: See ``seed``.
        device: E.g. ``cpu`` or ``cuda:0``.
        result: Folder for one ``<component>.safetensors`` each.
    """

    source: str
    family: str
    layers: Mapping[str, Mapping[str, Layer]]
    default: Layer
    prompts: list[Any]
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
    device: str
    result: str

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job that `tune` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data["default"] = Layer(**data["default"])
        data["layers"] = {
            component: {name: Layer(**layer) for name, layer in layers.items()}
            for component, layers in data["layers"].items()
        }
        return cls(**data)


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared error of one block's output before and after tuning."""

    block: str
    before: float
    after: float


def tune(job: Job, work: Path, on_progress: OnProgress) -> list[BlockLoss]:
    """Run a job in a child process.

    Args:
        job: What to tune.
        work: Folder for the job's files and log.
        on_progress: Told of calibration images and of tuned blocks.

    Returns:
        The loss of every block, in the order of tuning.

    Raises:
        QuantizationError: If the child fails in any way; the end of its log is in the error's notes.
    """
    job_path, log_path = work / "job.json", work / "autoround.log"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    Path(job.result).mkdir(exist_ok=True)
    losses: list[BlockLoss] = []
    failure: str | None = None
    reader, writer = os.pipe()
    with log_path.open("wb") as log, os.fdopen(reader, encoding="utf-8") as events:
        # The child watches its standard input: when this process dies, however, the pipe closes and it ends.
        child = subprocess.Popen(
            [sys.executable, "-m", "quantkit.quantize.autoround", str(job_path), str(writer)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
        )
        os.close(writer)
        try:
            for line in events:
                event = json.loads(line)
                if event["kind"] == "progress":
                    on_progress(Progress(event["stage"], event["done"], event["total"], event["detail"]))
                elif event["kind"] == "loss":
                    losses.append(BlockLoss(event["block"], event["before"], event["after"]))
                else:
                    failure = event["reason"]
            code = child.wait()
        finally:
            child.kill()
            child.communicate()  # waits, and closes the pipe it watched
    if failure is None and code != 0:
        failure = f"its process ended with code {code}" + (" (out of memory?)" if code == -9 else "")
    if failure is not None:
        error = QuantizationError(f"auto-round failed: {failure}")
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        error.add_note("The end of auto-round's log:\n" + "\n".join(tail))
        raise error
    return losses
