"""What is asked for, and every check that needs no weights."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import open_model
from quantkit.errors import OutputError, RecipeError, UnsupportedModelError
from quantkit.execution import resolve_device, resolve_dtype
from quantkit.families.base import Family
from quantkit.families.registry import detect, get_family
from quantkit.families.sizes import check_extent, given_in
from quantkit.generate.media import check_video_encoder
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling, Task
from quantkit.staging import stage
from quantkit_runtime.choice import check_choice, check_cuda_graphs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".gif", "")
TEXT_SUFFIXES = (".txt",)
_SUFFIXES = {"t2i": IMAGE_SUFFIXES, "chat": TEXT_SUFFIXES}
_BYTES_PER_PIXEL = 3


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        model: Folder of the model.
        prompt: What to generate; with the picture or sound that goes with it.
        output: File to write: an image ``.png``, ``.jpg`` or ``.webp``; a video ``.mp4``, ``.gif`` or, without a
            suffix, a folder of frames; an answer ``.txt``. None is for answers alone, which are then only returned.
        seed: Of the noise; None draws one.
        sampling: Layers of sampling keys over the family's defaults, the later the stronger.
        device: ``cpu``, ``cuda``, ``xpu`` ...; ``auto`` is the accelerator if there is one, else the CPU. Each rank
            takes an accelerator of its own; with a number, as in ``cuda:0``, all share that one.
        dtype: One of `quantkit.execution.DTYPES`.
        compute: How packed layers compute: ``auto``, ``16bit`` or ``fp8``.
        backend: Kernel backend of packed layers.
        compile: Compile the repeated blocks of the denoisers, or of the language model.
        cuda_graphs: Record the denoisers' calls and replay them.
        cfg_parallel: 2 runs the two branches of guidance on two ranks, 1 does not.
        tensor_parallel: Ranks that share the weights of the denoiser.
        replicas: Ranks that generate each on their own, with seeds that follow one another; each output has its
            seed in its name.
        overwrite: Whether an existing output is replaced.
        any_size: Whether more pixels and frames are drawn than a server would by default.
    """

    model: Path
    prompt: Prompt
    output: Path | None = None
    seed: int | None = None
    sampling: tuple[Sampling, ...] = ()
    device: str = "auto"
    dtype: str = "bfloat16"
    compute: str = "auto"
    backend: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    cfg_parallel: int = 1
    tensor_parallel: int = 1
    replicas: int = 1
    overwrite: bool = False
    any_size: bool = False


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks; it can be pickled.

    Attributes:
        request: What was asked for.
        family: Name of the model's family.
        task: What it does.
        seed: Of the noise.
        sampling: Complete.
        ranks: Processes that run it together.
    """

    request: Request
    family: str
    task: Task
    seed: int
    sampling: Sampling
    ranks: int

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """Sampling as arguments of the model's call."""
        return get_family(self.family).for_task(self.task).call_kwargs(self.sampling)

    def output_of(self, replica: int) -> Path | None:
        """Return what a replica writes; that is the output where there is but one."""
        output = self.request.output
        if output is None or self.request.replicas == 1:
            return output
        return output.with_name(f"{output.stem}-seed{self.seed + replica}{output.suffix}")


def prepare(request: Request) -> Job:
    """Check a request against its model's family, this machine and the output.

    Raises:
        RecipeError: If an option does not fit the family or this machine.
        BackendUnavailableError: If compute or backend are unknown, or the model has no packed layers to go to, or
            CUDA graphs cannot be had.
        UnsupportedModelError: If no family knows the model, or guidance cannot be run in parallel.
        OutputError: If the output exists (without ``overwrite``), cannot be written or has the wrong suffix.
        MissingExtraError: If a library that the output needs is not installed.
        CheckpointError: If the folder is no model.
    """
    if not request.prompt.text.strip():
        raise RecipeError("--prompt: is empty")
    model = open_model(request.model)
    family = detect(model)
    tasks = family.tasks
    draws = request.output is not None and request.output.suffix.lower() in IMAGE_SUFFIXES
    if draws and "t2i" in tasks:
        family = family.for_task("t2i")
    try:
        sampling = family.sampling_for(*request.sampling)
    except RecipeError as error:
        if family.task == "t2i" or "t2i" not in tasks:
            raise
        raise RecipeError(f"{error}; to draw, give an image as --output, such as x.png") from error
    family.check_sizes(model, sampling, given_in(request.sampling))
    if not request.any_size:
        check_extent(sampling, given_in(request.sampling))
    _check_inputs(request.prompt, family.name, family.task)
    device = resolve_device(request.device)
    if request.cuda_graphs:
        if family.task == "chat":
            raise RecipeError("--cuda-graphs: an answer has no denoising steps to record; leave it out")
        check_cuda_graphs(device.type, shares_weights=request.tensor_parallel > 1)
    resolve_dtype(request.dtype)
    check_choice(request.model, compute=request.compute, backend=request.backend)
    ranks = _count_ranks(request)
    if request.cfg_parallel > 1 and not family.is_guided(sampling):
        otherwise = "" if family.task == "chat" else "; --replicas 2 draws two seeds at once"
        raise UnsupportedModelError(
            f"--cfg-parallel: guidance is off, so there is no second branch to run at the same time: "
            f"{family.how_to_guide()}{otherwise}"
        )
    if request.replicas > 1 and family.task == "chat":
        raise UnsupportedModelError(f"--replicas: {family.name} answers the same with every seed; leave it out")
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    job = Job(request, family.name, family.task, seed, sampling, ranks)
    for replica in range(request.replicas):
        _check_output(request, job.output_of(replica), family, tasks, sampling)
    return job


def _count_ranks(request: Request) -> int:
    if request.cfg_parallel not in (1, 2):
        raise RecipeError(f"--cfg-parallel: must be 1 or 2, one rank for each branch, not {request.cfg_parallel}")
    if request.tensor_parallel < 1:
        raise RecipeError(f"--tensor-parallel: must be at least 1, not {request.tensor_parallel}")
    if request.replicas < 1:
        raise RecipeError(f"--replicas: must be at least 1, not {request.replicas}")
    together = request.cfg_parallel * request.tensor_parallel
    if request.replicas > 1 and together > 1:
        raise RecipeError("--replicas: each is one rank; leave out --cfg-parallel and --tensor-parallel")
    return together * request.replicas


def _check_inputs(prompt: Prompt, name: str, task: str) -> None:
    takes = {"i2v": ("image",), "chat": ("image", "audio")}.get(task, ())
    for kind in ("image", "audio"):
        path = getattr(prompt, kind)
        if path is None:
            continue
        if kind not in takes:
            draws = "draws from text alone" if task == "t2i" else "takes none"
            raise RecipeError(f"--{kind}: {name} {draws}; leave it out")
        if not Path(path).is_file():
            raise RecipeError(f"--{kind}: {path}: no such file")
    if task == "i2v" and prompt.image is None:
        raise RecipeError(f"--image: {name} starts from a picture; give one")


def _check_output(
    request: Request, output: Path | None, family: Family, tasks: Sequence[Task], sampling: Sampling
) -> None:
    suffixes = [suffix for task in tasks for suffix in _SUFFIXES.get(task, VIDEO_SUFFIXES)]
    known = " or ".join(suffix or "a folder (no suffix)" for suffix in suffixes)
    if output is None:
        if family.task != "chat":
            raise OutputError(f"--output: give a file to write, {known}")
        return
    if output.suffix.lower() not in suffixes:
        raise OutputError(f"{output}: {family.name} writes {known}")
    if output.is_dir() != (output.suffix == "") and output.exists():
        kind = "a folder" if output.is_dir() else "a file"
        raise OutputError(f"{output}: is {kind}; give another --output")
    if output.suffix.lower() == ".mp4":
        check_video_encoder()
    from quantkit_runtime.parallel.launch import launched

    if launched() and os.environ["RANK"] != "0":  # all ranks at once would be in each other's way
        return
    pixels = (sampling.height or 0) * (sampling.width or 0) * (sampling.num_frames or 1)
    with stage(output, overwrite=request.overwrite, need_bytes=pixels * _BYTES_PER_PIXEL, marker=marker_of(output)):
        pass  # it can be written


def marker_of(output: Path) -> str | None:
    """Return the file by which a folder shows that it is a video that was generated; None for a single file."""
    return None if output.suffix else "frame0000.png"


StepCallback = Callable[[int, int], None]
"""Called after every step with the number of steps done and of all."""
