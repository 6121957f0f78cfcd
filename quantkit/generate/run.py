"""Running a job, in this process or as one rank of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.execution import resolve_device, resolve_dtype
from quantkit.families.base import DiffusionFamily
from quantkit.families.language import LanguageFamily
from quantkit.families.registry import get_family
from quantkit.generate.media import write_image, write_video
from quantkit.generate.request import Job, StepCallback, marker_of
from quantkit.staging import stage

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Made:
    """What came out.

    Attributes:
        text: The answer; None of an image or video.
        output: What was written; None of an answer that was not.
        seed: Of the noise.
        steps: Denoising steps, or tokens.
        seconds: From call to output, without loading.
    """

    text: str | None
    output: Path | None
    seed: int
    steps: int
    seconds: float


def run(job: Job, on_step: StepCallback | None = None) -> Made | None:
    """Load the model, generate and write the output.

    A job of several ranks runs in each of them, started by ``quantkit_runtime.parallel.launch`` or by torchrun.

    Args:
        job: From `prepare`; the same in all ranks.
        on_step: Called in the first rank.

    Returns:
        None in ranks that help another one.

    Raises:
        QuantkitError: The model cannot be loaded or does not fit, it refuses an argument, what it gives is not
            finite, or the output cannot be written.
        ParallelError: The ranks cannot run it together.
    """
    import torch

    family = get_family(job.family).for_task(job.task)
    try:
        with _ranks(job) as (seed, replica, device, mesh):
            is_first = mesh is None or mesh.get_rank() == 0
            on_step = on_step if is_first and not replica else None
            output = job.output_of(replica)
            if isinstance(family, LanguageFamily):
                made = _answer(job, family, device, mesh, on_step)
                if is_first and output is not None:
                    _publish(job, output, lambda path: path.write_text(f"{made.text}\n", encoding="utf-8"))
            else:
                assert isinstance(family, DiffusionFamily)
                assert output is not None
                frames, made = _draw(replace(job, seed=seed), family, device, mesh, on_step)
                if is_first:
                    _publish(job, output, lambda path: _write_frames(path, frames, family))
            return replace(made, output=output) if is_first else None
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise QuantkitError(f"{job.request.model}: does not fit into memory: {reason}") from error


@contextmanager
def _ranks(job: Job) -> Iterator[tuple[int, int, torch.device, Any]]:
    """Join the other ranks of a job, if it has any; yield seed, replica, this rank's device and the mesh."""
    from quantkit_runtime.parallel.launch import joined, launched

    device = resolve_device(job.request.device)
    if job.ranks == 1 and not launched():
        yield job.seed, 0, device, None
        return
    import torch.distributed as dist

    from quantkit_runtime.parallel.agreement import check_same_arguments, shared_seed
    from quantkit_runtime.parallel.mesh import make_mesh

    with joined(str(device)) as device:
        request, everyone = job.request, (None,)
        # Replicas are rows of their own, which need nothing of each other.
        mesh = make_mesh(device, cfg=request.cfg_parallel * request.replicas, tensor=request.tensor_parallel)
        check_same_arguments(vars(request), everyone)
        seed = shared_seed(everyone, job.seed)
        if request.replicas > 1:
            yield seed + dist.get_rank(), dist.get_rank(), device, None
        else:
            yield seed, 0, device, mesh


def _draw(
    job: Job, family: DiffusionFamily, device: torch.device, mesh: Any, on_step: StepCallback | None
) -> tuple[np.ndarray, Made]:
    import numpy as np
    import torch

    from quantkit_runtime import load_pipeline

    pipeline = load_pipeline(
        job.request.model,
        device=device,
        dtype=resolve_dtype(job.request.dtype),
        compute=job.request.compute,
        backend=job.request.backend,
        compile=job.request.compile,
        cuda_graphs=job.request.cuda_graphs,
        tensor_parallel=None if mesh is None else mesh["tensor"],
    )
    pipeline.set_progress_bar_config(disable=True)
    call = pipeline if mesh is None else _parallel_call(pipeline, mesh)
    steps = 0

    def count_step(pipe: Any, index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        nonlocal steps
        steps = index + 1
        if on_step is not None:
            on_step(steps, int(pipe.num_timesteps))
        return {}

    inputs = family.prompt_kwargs(job.request.prompt) | job.call_kwargs
    began = time.perf_counter()
    try:
        with torch.no_grad():
            output = call(
                **inputs,
                generator=torch.Generator("cpu").manual_seed(job.seed),
                callback_on_step_end=count_step,
                output_type="np",
            )
    except ValueError as error:  # of the checks that begin every call in diffusers
        raise RecipeError(f"sampling: {type(pipeline).__name__} refuses it: {error}") from error
    made = Made(None, None, job.seed, steps, time.perf_counter() - began)
    # A pipeline gives a list of images or of videos; one of either was asked for.
    frames = np.asarray(output.images if hasattr(output, "images") else output.frames[0], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise CheckpointError(f"{job.request.model}: what it draws is not finite (NaN or infinity)")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8), made


def _parallel_call(pipeline: Any, mesh: Any) -> Any:
    from quantkit_runtime.parallel.mesh import parallel_call

    return parallel_call(pipeline, mesh)


def _answer(
    job: Job, family: LanguageFamily, device: torch.device, mesh: Any, on_step: StepCallback | None
) -> Made:
    from quantkit_runtime import load_model
    from quantkit_runtime.generation.batch import write_greedily
    from quantkit_runtime.generation.text import tokenizer_of
    from quantkit_runtime.generation.writer import writer_of

    model = load_model(
        job.request.model,
        device=device,
        dtype=resolve_dtype(job.request.dtype),
        compute=job.request.compute,
        backend=job.request.backend,
        compile=job.request.compile,
        tensor_parallel=None if mesh is None else mesh["tensor"],
    )
    processor = family.load_processor(job.request.model)
    inputs, tokenizer = family.ask(processor, job.request.prompt), tokenizer_of(processor)
    limit, count, text = int(job.call_kwargs["max_new_tokens"]), 0, ""
    began = time.perf_counter()
    try:
        pieces = write_greedily(writer_of(model, tokenizer), tokenizer, inputs, limit)
    except ValueError as error:
        raise RecipeError(f"--max-new-tokens: {error}") from error
    for count, piece in enumerate(pieces, 1):
        if piece.failure is not None:
            raise CheckpointError(f"{job.request.model}: {piece.failure} (NaN or infinity)")
        text += piece.text
        if on_step is not None:
            on_step(count, limit)
    return Made(text, None, job.seed, count, time.perf_counter() - began)


def _write_frames(path: Path, frames: np.ndarray, family: DiffusionFamily) -> None:
    if family.task == "t2i":
        write_image(path, frames)
    else:
        write_video(path, frames, family.frames_per_second)


def _publish(job: Job, output: Path, write: Callable[[Path], object]) -> None:
    """Write the output beside its place and give it its name when it is complete."""
    with stage(output, overwrite=job.request.overwrite, need_bytes=0, marker=marker_of(output)) as staging:
        made = staging.work / output.name
        write(made)
        staging.publish(overwrite=job.request.overwrite, content=made)
