"""The comparison itself: the reference first, then the candidate against what was recorded of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.checkpoint import ModelFolder, open_model
from quantkit.compare.difference import map_name
from quantkit.compare.kernels import check_kernels
from quantkit.compare.kinds import KINDS, Kind
from quantkit.compare.pairing import check_same_architecture
from quantkit.compare.provenance import created_now, device_name, library_versions
from quantkit.compare.report import write_report
from quantkit.compare.request import Request
from quantkit.compare.result import INPUTS_FOLDER, RESULT_FILE, Comparison, Item, ModelSide, write_result
from quantkit.compare.sampler import MIN_TIMED_STEPS, Sampler
from quantkit.compare.scoring import Scorer
from quantkit.compare.shots import ProgressCallback, Shot
from quantkit.compare.summary import by_metric, curve_spreads, summaries
from quantkit.compare.tasks import open_task
from quantkit.compare.tasks.base import Context
from quantkit.errors import UnsupportedModelError
from quantkit.execution import resolve_device, resolve_dtype
from quantkit.families.registry import detect
from quantkit.families.sizes import check_extent, given_in
from quantkit.gate.thresholds import DEFAULT_THRESHOLDS, check_names
from quantkit.gate.verdict import judge
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling
from quantkit.staging import stage
from quantkit_runtime.choice import check_choice

_BYTES_PER_PIXEL = 9  # three RGB pictures of which PNG makes no more than that


def compare(
    request: Request, output: Path, *, overwrite: bool = False, on_progress: ProgressCallback | None = None
) -> Comparison:
    """Run both models on the same prompts and seeds, and judge how far they drift apart.

    Writes ``result.json``, ``report.html`` and what the models made into the output folder, which appears whole or
    not at all.

    Raises:
        RecipeError: If prompts, seeds, sampling keys, sizes, a metric's name, the device or dtype are no good, or
            there is no kernel for them here.
        BackendUnavailableError: If compute or backend are unknown, or neither model has packed layers to go to.
        UnsupportedModelError: If the family cannot do the task or the architectures differ.
        CheckpointError: If a model cannot be loaded, or the reference does not produce finite values.
        MissingExtraError: If a library that the comparison needs is not installed.
        OutputError: If the output exists (without ``overwrite``) or cannot be written.
    """
    kind = KINDS[request.task]
    thresholds = dict(request.thresholds or DEFAULT_THRESHOLDS[request.task])
    source = request.thresholds_source or f"built in for {request.task}"
    shots = request.shots()
    reference, candidate = open_model(request.reference), open_model(request.candidate)
    try:
        family = detect(reference).for_task(request.task)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{request.reference}: {error}") from error
    check_names(thresholds, kind.metrics(), source)  # after the task: of a wrong one every metric is unknown
    check_same_architecture(reference, candidate)
    sampling = family.sampling_for(*request.sampling)
    family.check_sizes(reference, sampling, given_in(request.sampling))
    if not request.any_size:
        check_extent(sampling, given_in(request.sampling))
    device, dtype = resolve_device(request.device), resolve_dtype(request.dtype)
    check_choice(request.reference, request.candidate, compute=request.compute, backend=request.backend)
    for model in (reference, candidate):
        check_kernels(model, device, dtype, compute=request.compute, backend=request.backend)

    need_bytes = len(shots) * _pixels(sampling) * _BYTES_PER_PIXEL
    with stage(output, overwrite=overwrite, need_bytes=need_bytes, marker=RESULT_FILE) as staging:
        folder = staging.content
        task = open_task(
            request.task,
            Context(
                shots=shots,
                folder=folder,
                work=staging.work,
                device=device,
                dtype=dtype,
                compute=request.compute,
                backend=request.backend,
                compile=request.compile,
                family=family,
                call_kwargs=family.call_kwargs(sampling),
                lpips_backbone=request.lpips_backbone,
            ),
        )
        sampler = Sampler(task, extra_shots=int(request.noise_floor), on_progress=on_progress)
        scorer = Scorer(task)
        reference_side = sampler.run(
            "reference",
            reference,
            scorer.keep_reference,
            label=request.reference_label or reference.folder.name,
            repeat=(0,) if request.noise_floor else (),
        )
        candidate_side = sampler.run(
            "candidate",
            candidate,
            scorer.score_candidate,
            label=request.candidate_label or candidate.folder.name,
        )
        task.close()

        items = tuple(scorer.items)
        if reference_side.step_ms is None or candidate_side.step_ms is None:
            items = tuple(map(_without_time, items))
        values = by_metric(items)
        costs, unavailable = _costs(reference_side, candidate_side, len(request.prompts))
        unavailable = {**task.unavailable, **unavailable}
        if not any("step_time_ratio" in item.metrics for item in items):
            unavailable["step_time_ratio"] = (
                f"too few {kind.step}s to time: needs {MIN_TIMED_STEPS} beside the first of every {kind.output}"
            )
        result = Comparison(
            schema_version=1,
            created=created_now(),
            command=request.command,
            versions=library_versions(),
            device=device_name(device),
            dtype=request.dtype,
            compute=request.compute,
            backend=request.backend,
            compiled=request.compile,
            recipe=request.recipe,
            recipe_sha256=request.recipe_sha256,
            family=family.name,
            task=request.task,
            sampling=task.made.over(sampling),
            scheduler=_scheduler(reference),
            timesteps=task.timesteps,
            prompts=_keep_prompts(shots, folder),
            seeds=tuple(dict.fromkeys(shot.seed for shot in shots)),
            reference=reference_side,
            candidate=candidate_side,
            items=items,
            curves=curve_spreads(items),
            metrics=summaries({**values, **costs}),
            unavailable=unavailable,
            difference_map=map_name() if request.task == "t2i" else "absolute error",
            noise_floor=scorer.noise_floor,
            thresholds_source=source,
            verdict=judge(
                {**values, **costs}, thresholds, unavailable=unavailable, failures=_failures(items, kind)
            ),
        )
        write_result(result, folder)
        write_report(result, folder)
        staging.publish(overwrite=overwrite)
    return result


def _keep_prompts(shots: Sequence[Shot], folder: Path) -> tuple[Prompt, ...]:
    """Copy the prompts' pictures beside the result, and return the prompts with their names there."""
    prompts = {shot.index: shot.prompt for shot in shots}
    for index, prompt in prompts.items():
        if prompt.image is not None:
            name = Path(INPUTS_FOLDER, f"prompt{index:04d}{Path(prompt.image).suffix}")
            (folder / INPUTS_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(prompt.image, folder / name)
            prompts[index] = replace(prompt, image=str(name))
    return tuple(prompts.values())


def _without_time(item: Item) -> Item:
    metrics = {name: value for name, value in item.metrics.items() if name != "step_time_ratio"}
    return item.model_copy(update={"metrics": metrics})


def _pixels(sampling: Sampling) -> int:
    """Return the pixels of one output."""
    return (sampling.height or 0) * (sampling.width or 0) * (sampling.num_frames or 1)


def _scheduler(model: ModelFolder) -> str | None:
    scheduler = model.components.get("scheduler")
    return scheduler.class_name if scheduler is not None else None


def _costs(
    reference: ModelSide, candidate: ModelSide, prompts: int
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Return the ratios that hold for a whole run, once per prompt as they do not vary, and what is missing."""
    ratios = {"weight_memory_ratio": sum(candidate.weight_bytes.values()) / sum(reference.weight_bytes.values())}
    unavailable = {}
    if reference.peak_memory_bytes is None or candidate.peak_memory_bytes is None:
        unavailable["peak_memory_ratio"] = reference.peak_memory_note
    elif reference.peak_memory_bytes <= 0:
        unavailable["peak_memory_ratio"] = "the reference takes too little memory to be measured"
    else:
        ratios["peak_memory_ratio"] = max(candidate.peak_memory_bytes, 0) / reference.peak_memory_bytes
    return {name: [[ratio]] * prompts for name, ratio in ratios.items()}, unavailable


def _failures(items: tuple[Item, ...], kind: Kind) -> tuple[str, ...]:
    found = [item.failure for item in items if item.failure is not None]
    if not found:
        return ()
    return (
        f"{len(found)} of {len(items)} {kind.output}s of the candidate cannot be scored: {found[0]}",
        *found[1:],
    )
