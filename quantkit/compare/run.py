"""The comparison itself: the reference first, then the candidate against what was recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint import open_pipeline
from quantkit.compare.difference import map_name
from quantkit.compare.metrics import METRICS
from quantkit.compare.pairing import check_same_architecture
from quantkit.compare.provenance import created_now, device_name, library_versions
from quantkit.compare.report import write_report
from quantkit.compare.result import RESULT_FILE, Comparison, Item, ModelSide, write_result
from quantkit.compare.sampler import ProgressCallback, Sampler, Settings, Shot
from quantkit.compare.scoring import Scorer
from quantkit.compare.summary import by_metric, spread, summaries
from quantkit.errors import MissingExtraError, RecipeError, UnsupportedModelError
from quantkit.families.registry import detect
from quantkit.gate.thresholds import DEFAULT_THRESHOLDS, check_names
from quantkit.gate.verdict import judge
from quantkit.recipe.schema import Sampling, Task, Threshold
from quantkit.staging import stage

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_THRESHOLDS_SOURCE = "built in (final image, as recommended by vLLM-Omni's comparison tool)"

_BYTES_PER_PIXEL = 9  # three RGB images of which PNG makes no more than that


@dataclass(frozen=True)
class Request:
    """What to compare, and how.

    Attributes:
        reference: Folder of the model that is right by definition.
        candidate: Folder of the model that is judged.
        prompts: Texts, each used with every seed.
        seeds: Seeds of the initial noise.
        reference_label: What people call the reference; empty takes the folder's name.
        candidate_label: Likewise.
        task: What the models are asked to do.
        sampling: Layers of sampling keys over the family's defaults, the later the stronger.
        thresholds: Bounds per metric; empty takes `DEFAULT_THRESHOLDS`.
        thresholds_source: Where the thresholds come from, for messages and the report.
        device: ``cpu``, ``cuda``, ``xpu`` ...; ``auto`` is the accelerator if there is one, else the CPU.
        dtype: One of `DTYPES`.
        backend: Kernel backend of packed layers.
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.
        noise_floor: Whether the reference runs its first shot twice, which shows what differs without quantization.
        recipe: Path of the recipe that the values come from.
        recipe_sha256: Of that file.
        command: The command line, for the report.
    """

    reference: Path
    candidate: Path
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    reference_label: str = ""
    candidate_label: str = ""
    task: Task = "t2i"
    sampling: tuple[Sampling, ...] = ()
    thresholds: Mapping[str, Threshold] | None = None
    thresholds_source: str = DEFAULT_THRESHOLDS_SOURCE
    device: str = "auto"
    dtype: str = "bfloat16"
    backend: str = "auto"
    lpips_backbone: Path | None = None
    noise_floor: bool = True
    recipe: str | None = None
    recipe_sha256: str | None = None
    command: tuple[str, ...] = ()


def compare(
    request: Request, output: Path, *, overwrite: bool = False, on_progress: ProgressCallback | None = None
) -> Comparison:
    """Run both models on the same prompts, seeds, scheduler and steps, and judge how far they drift apart.

    Writes ``result.json``, ``report.html`` and ``images/`` into the output folder, which appears whole or not at
    all.

    Raises:
        RecipeError: If prompts, seeds, sampling keys, a metric's name, the device, dtype or backend are no good.
        UnsupportedModelError: If the family cannot do the task or the architectures differ.
        CheckpointError: If a model cannot be loaded, or the reference does not produce finite images.
        MissingExtraError: If a library that the comparison needs is not installed.
        OutputError: If the output exists (without ``overwrite``) or cannot be written.
    """
    thresholds = dict(request.thresholds or DEFAULT_THRESHOLDS)
    check_names(thresholds, METRICS, request.thresholds_source)
    _check_shots(request)
    reference, candidate = open_pipeline(request.reference), open_pipeline(request.candidate)
    family = detect(reference)
    if family.task != request.task or request.task != "t2i":
        raise UnsupportedModelError(
            f"{request.reference}: task {request.task}: the family {family.name} does {family.task}, "
            "and t2i is what can be compared"
        )
    check_same_architecture(reference, candidate)
    sampling = family.sampling_for(*request.sampling)
    device, dtype = _resolve_device(request.device), _resolve_dtype(request.dtype)
    _check_backend(request.backend)

    shots = [Shot(index, text, seed) for index, text in enumerate(request.prompts) for seed in request.seeds]
    pixels = (sampling.height or 0) * (sampling.width or 0)
    need_bytes = len(shots) * pixels * _BYTES_PER_PIXEL
    with stage(output, overwrite=overwrite, need_bytes=need_bytes, marker=RESULT_FILE) as staging:
        folder = staging.content
        sampler = Sampler(
            Settings(device, dtype, request.backend, family.call_kwargs(sampling)),
            shots,
            extra_shots=int(request.noise_floor),
            on_progress=on_progress,
        )
        scorer = Scorer(shots, folder, staging.work, request.lpips_backbone)
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
        scorer.close()

        items = tuple(scorer.items)
        values = by_metric(items)
        costs, unavailable = _costs(reference_side, candidate_side, len(request.prompts))
        unavailable = {**scorer.unavailable, **unavailable}
        if not any("step_time_ratio" in item.metrics for item in items):
            unavailable["step_time_ratio"] = "needs at least two steps per image"
        result = Comparison(
            schema_version=1,
            created=created_now(),
            command=request.command,
            versions=library_versions(),
            device=device_name(device),
            dtype=request.dtype,
            backend=request.backend,
            recipe=request.recipe,
            recipe_sha256=request.recipe_sha256,
            family=family.name,
            task=request.task,
            sampling=sampling,
            scheduler=reference.components["scheduler"].class_name,
            timesteps=scorer.timesteps,
            prompts=request.prompts,
            seeds=request.seeds,
            reference=reference_side,
            candidate=candidate_side,
            items=items,
            latent_rel_l2=spread([item.latent_rel_l2 for item in items if item.failure is None]),
            latent_cosine=spread([item.latent_cosine for item in items if item.failure is None]),
            metrics=summaries({**values, **costs}),
            unavailable=unavailable,
            difference_map=map_name(),
            noise_floor=scorer.noise_floor,
            thresholds_source=request.thresholds_source,
            verdict=judge({**values, **costs}, thresholds, unavailable=unavailable, failures=_failures(items)),
        )
        write_result(result, folder)
        write_report(result, folder)
        staging.publish(overwrite=overwrite)
    return result


def _check_shots(request: Request) -> None:
    if not request.prompts or not all(text.strip() for text in request.prompts):
        raise RecipeError("prompts: give at least one, none of them empty (--prompt, --prompts or compare.prompts)")
    if not request.seeds or len(set(request.seeds)) != len(request.seeds):
        raise RecipeError("seeds: give at least one, each of them once")


def _resolve_device(name: str) -> torch.device:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "eval") from error

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: '{name}' is unknown to torch; use auto, cpu, cuda or xpu") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        here = "cpu only" if accelerator is None else f"cpu and {accelerator.type}"
        raise RecipeError(f"device: '{name}' is not available here ({here})")
    return device


def _resolve_dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise RecipeError(f"dtype: '{name}' is unknown; use one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_backend(name: str) -> None:
    # The loader looks at the name only when it meets a packed layer; a misspelt one must not pass without.
    from quantkit_runtime.kernels import backends

    known = ["auto", *(backend.name for backend in backends("linear"))]
    if name not in known:
        raise RecipeError(f"backend: '{name}' is unknown; use one of {', '.join(known)}")


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


def _failures(items: tuple[Item, ...]) -> tuple[str, ...]:
    found = [item.failure for item in items if item.failure is not None]
    if not found:
        return ()
    return (f"{len(found)} of {len(items)} images of the candidate cannot be scored: {found[0]}", *found[1:])
