"""A whole quantization: check, plan, tune or round, write, verify, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder, open_model
from quantkit.errors import CheckpointError, OutputError, QuantizationError, RecipeError, UnsupportedModelError
from quantkit.families.base import Family
from quantkit.families.registry import detect, get_family
from quantkit.inspect.rule import Target
from quantkit.inspect.servability import Finding, check_natural_targets
from quantkit.quantize.card import render_card
from quantkit.quantize.devices import resolve_devices
from quantkit.quantize.export import place_untouched, write_component, write_json
from quantkit.quantize.hashes import hash_files
from quantkit.quantize.jobs import fingerprint, identify, make_job
from quantkit.quantize.manifest import describe_run, library_versions
from quantkit.quantize.memory import CalibrationMemory, cache_fits, check_memory, estimate_memory, keys_to_lower
from quantkit.quantize.metadata import quantization_config
from quantkit.quantize.plan import ComponentPlan, Plan, PlannedLayer, make_plan
from quantkit.quantize.progress import OnNotice, OnProgress, Progress, ignore
from quantkit.quantize.resume import TunedBlocks, open_blocks
from quantkit.quantize.rtn import Pack, round_to_nearest
from quantkit.quantize.tensors import open_threads, read_blocks, read_tensor
from quantkit.quantize.tuning import Tuned, tune
from quantkit.quantize.values import LayerError
from quantkit.quantize.verify import verify
from quantkit.recipe.load import MANIFEST, LoadedRecipe
from quantkit.recipe.locate import find_prompts
from quantkit.recipe.schema import Sampling, parse_size
from quantkit.staging import Staging, stage
from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# The manifest, the card and index files, generously.
_SLACK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Prepared:
    """A run about which all is known that can be known without reading a weight."""

    loaded: LoadedRecipe
    family: Family
    plan: Plan
    prompts: list[Any]
    """Calibration prompts; empty for round-to-nearest."""
    memory: CalibrationMemory | None
    """What calibration will take; None for round-to-nearest, and where the family cannot tell."""


@dataclass(frozen=True)
class Quantized:
    """A finished run."""

    output: Path
    plan: Plan
    errors: list[LayerError]
    tuned: Tuned | None
    """What tuning reported; None for round-to-nearest."""
    servability: dict[Target, list[Finding]]
    """What keeps each serving engine from the checkpoint, or limits it."""
    nbytes: int
    """Of all files of the checkpoint."""
    seconds: float


def prepare(loaded: LoadedRecipe, source: Path | ModelFolder) -> Prepared:
    """Check a recipe against a model and plan the run.

    Args:
        loaded: The recipe.
        source: The 16-bit model: its local folder, or what is known of it.

    Raises:
        CheckpointError: If the model is incomplete or damaged.
        RecipeError: If the recipe does not fit the model, or its prompts cannot be read.
        UnsupportedModelError: If the family is unknown, or another than the recipe says.
    """
    recipe = loaded.recipe
    expected = get_family(recipe.model.family) if recipe.model.family is not None else None
    model = _open_whole(source) if isinstance(source, Path) else source
    family = detect(model)
    if expected is not None and expected.name != family.name:
        raise UnsupportedModelError(
            f"{loaded.path}: model.family: is {expected.name}, but {model.folder} is a {family.name} model"
        )
    if recipe.model.task != family.task:
        raise UnsupportedModelError(
            f"{loaded.path}: model.task: recipes of {family.name} say {family.task}, not {recipe.model.task}"
        )
    for name in ("calibration", "compare", "serve"):
        section = getattr(recipe, name)
        sampling = family.sampling_for(recipe.sampling, section)
        family.check_sizes(model, sampling, _keys_of(loaded.path, name, section))
    plan = make_plan(model, family, recipe)
    if not recipe.scheme.tuned:
        return Prepared(loaded, family, plan, [], None)
    prompts = _calibration_samples(loaded, family)
    family.check_calibration(model.folder, prompts, recipe.scheme.seqlen)  # now, not after an hour
    return Prepared(loaded, family, plan, prompts, estimate_memory(plan, family, recipe))


def _open_whole(folder: Path) -> ModelFolder:
    model = open_model(folder)
    for component in model.components.values():
        if missing := component.find_missing():
            raise CheckpointError(f"{missing}; download the model again")
    return model


def _keys_of(path: Path, name: str, section: Sampling) -> Callable[[str], str]:
    """Return how to name a sampling key: as the section's if that gives it, else as of ``sampling``."""
    return lambda key: f"{path}: {name if getattr(section, key) is not None else 'sampling'}.{key}"


def _calibration_samples(loaded: LoadedRecipe, family: Family) -> list[Any]:
    calibration = loaded.recipe.calibration
    wanted = loaded.recipe.scheme.nsamples
    if calibration.prompts is None:
        return []
    path = find_prompts(calibration.prompts, loaded.path)
    prompts = family.read_calibration(path)
    if len(prompts) < wanted:
        raise QuantizationError(
            f"{path}: holds {len(prompts)} prompts, scheme.nsamples asks for {wanted}; add some or lower it"
        )
    return prompts[:wanted]


def quantize(
    prepared: Prepared,
    output: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = True,
    on_progress: OnProgress = ignore,
    on_notice: OnNotice = ignore,
) -> Quantized:
    """Carry out a prepared run and publish the checkpoint.

    Args:
        prepared: From `prepare`.
        output: Folder of the checkpoint; it appears complete and verified or not at all.
        device: Where tuning runs, e.g. ``cpu``, ``cuda:0`` or ``auto``.
        overwrite: Replace an existing output, after the new checkpoint has been verified.
        resume: Go on after the blocks that an earlier, failed run to the same output has tuned, if it was for the
            same recipe, source, device type and versions.
        on_progress: Told of every step.
        on_notice: Told of what is taken up of an earlier run, or why nothing is.

    Raises:
        CheckpointError: If the source holds NaN or infinity.
        OutputError: If the output exists, cannot be written, or holds the source.
        QuantizationError: If tuning fails or does not fit the memory, or the result does not match the plan.
        RecipeError: If a device is not here, or is one too many.
    """
    started = time.monotonic()
    plan, recipe = prepared.plan, prepared.loaded.recipe
    if plan.source.folder.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output}: holds the model that is to be quantized; give another --output")
    devices = resolve_devices(device)
    if len(devices) > 1 and not prepared.family.several_devices:
        raise RecipeError(
            f"--device: auto-round tunes a {prepared.family.name} model on one device; give one of them"
        )
    cache_on_host = _place_cache(prepared, devices)
    need_bytes = plan.nbytes_after + _SLACK_BYTES
    if recipe.scheme.tuned:  # what tuning leaves is there twice until the checkpoint is written
        need_bytes += sum(layer.nbytes for part in plan.components for layer in part.layers)
    with stage(output, overwrite=overwrite, need_bytes=need_bytes, marker=plan.source.index_file) as staging:
        # Rounding looks at each weight of its components anyway, and costs little if one is bad.
        rounded = set() if recipe.scheme.tuned else {part.component.name for part in plan.components}
        components = plan.source.components
        _check_finite([components[name] for name in components if name not in rounded], on_progress)
        tuned: Tuned | None = None
        packs = {part.component.name: round_to_nearest(part.component) for part in plan.components}
        if recipe.scheme.tuned:
            tuned, blocks = _tune(prepared, devices, cache_on_host, staging, resume, on_progress, on_notice)
            packs = {part.component.name: _from_blocks(part, blocks) for part in plan.components}
        versions = library_versions()
        place_untouched(plan.source, [*packs], staging.content)
        for part in plan.components:
            config = quantization_config(
                part,
                iters=recipe.scheme.iters,
                autoround_version=versions.get("auto-round", "none"),
                engine=prepared.family.engine_of(part.component),
            )
            write_component(
                part,
                packs[part.component.name],
                prepared.family.quantized_config(part.component, config),
                staging.content / part.component.folder.relative_to(plan.source.folder),
                max_shard_bytes=parse_size(recipe.export.max_shard_size),
                on_progress=on_progress,
            )
        errors = _verify(staging.content, plan, on_progress)
        seconds = time.monotonic() - started
        manifest = describe_run(
            prepared.loaded,
            plan,
            errors,
            tuned,
            versions=versions,
            device=devices[0],
            seconds=seconds,
            nbytes=sum(component.nbytes for component in open_model(staging.content).components.values()),
        )
        servability = check_natural_targets(staging.content)
        manifest["servability"] = {target: [vars(one) for one in found] for target, found in servability.items()}
        (staging.content / "README.md").write_text(render_card(manifest), encoding="utf-8")
        manifest["files"] = hash_files(staging.content, on_progress)
        write_json(staging.content / MANIFEST, manifest)
        staging.publish(overwrite=overwrite)
    nbytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return Quantized(output, plan, errors, tuned, servability, nbytes, time.monotonic() - started)


def _check_finite(components: Iterable[Component], on_progress: OnProgress) -> None:
    """Refuse weights with NaN or infinity before hours are spent on them."""
    infos = [info for component in components for info in component.tensors.values()]
    with open_threads() as threads:
        for number, info in enumerate(threads.map(_read_through, infos), start=1):
            on_progress(Progress("check", number, len(infos), info.name))


def _read_through(info: TensorInfo) -> TensorInfo:
    for _ in read_blocks(info):
        pass
    return info


def _place_cache(prepared: Prepared, devices: tuple[str, ...]) -> bool:
    """Check that calibration fits; say whether the host has to hold what a device cannot."""
    if not prepared.loaded.recipe.scheme.tuned:
        return False
    on_host = not cache_fits(prepared.memory, devices[0])
    if prepared.memory is not None:
        keys = keys_to_lower(prepared.family, prepared.loaded.recipe, cached=True)
        check_memory(prepared.memory, keys, cache_on_host=on_host or devices == ("cpu",))
    return on_host


def _tune(
    prepared: Prepared,
    devices: tuple[str, ...],
    cache_on_host: bool,
    staging: Staging,
    resume: bool,
    on_progress: OnProgress,
    on_notice: OnNotice,
) -> tuple[Tuned, TunedBlocks]:
    plan, family, recipe = prepared.plan, prepared.family, prepared.loaded.recipe
    job = make_job(plan, family, recipe, prepared.prompts, devices=devices, cache_on_host=cache_on_host)
    identity = identify(job, fingerprint(plan.source, on_progress), library_versions())
    blocks = open_blocks(staging.kept, identity, resume=resume, on_notice=on_notice)
    try:
        return tune(job, blocks, staging.work, on_progress), blocks
    except BaseException:
        if kept := len(blocks.files):
            plural = "block is" if kept == 1 else "blocks are"
            on_notice(f"{kept} tuned {plural} kept in {staging.kept}; the same command goes on from there")
        else:
            blocks.discard()
        raise


def _from_blocks(part: ComponentPlan, blocks: TunedBlocks) -> Pack:
    """Return a function that gives the packed tensors which tuning left."""
    infos = blocks.find_tensors(part.component.name)

    def pack_layer(layer: PlannedLayer) -> dict[str, Tensor]:
        missing = [name for name in layer.tensors if name not in infos]
        if missing:
            raise QuantizationError(f"auto-round left {layer.name} unquantized, against the plan")
        return {name: read_tensor(infos[name]) for name in layer.tensors}

    return pack_layer


def _verify(checkpoint: Path, plan: Plan, on_progress: OnProgress) -> list[LayerError]:
    result = verify(
        checkpoint,
        source=plan.source.folder,
        planned={part.component.name: list(part.layers) for part in plan.components},
        on_progress=on_progress,
    )
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        error = QuantizationError(f"the result does not match the plan: {result.problems[0]}{more}")
        error.add_note("\n".join(result.problems))
        raise error
    return result.errors
