"""A whole quantization: check, plan, tune or round, write, verify, publish."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Pipeline, open_pipeline, read_header
from quantkit.errors import CheckpointError, OutputError, QuantizationError, UnsupportedModelError
from quantkit.families.base import Family
from quantkit.families.registry import detect, get_family
from quantkit.quantize.card import render_card
from quantkit.quantize.export import place_untouched, write_component, write_json
from quantkit.quantize.manifest import SCHEMA_VERSION, hash_files, library_versions
from quantkit.quantize.plan import ComponentPlan, Plan, PlannedLayer, make_plan, quantization_config
from quantkit.quantize.progress import OnProgress, Progress, ignore
from quantkit.quantize.rtn import Pack, round_to_nearest
from quantkit.quantize.tensors import read_tensor, read_tensors
from quantkit.quantize.tuning import BlockLoss, Job, Layer, tune
from quantkit.quantize.verify import LayerError, verify
from quantkit.recipe.load import MANIFEST, LoadedRecipe
from quantkit.recipe.locate import find_prompts
from quantkit.recipe.schema import parse_size
from quantkit.staging import stage

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = {"F64", "F32", "F16", "BF16"}
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


@dataclass(frozen=True)
class Quantized:
    """A finished run."""

    output: Path
    plan: Plan
    errors: list[LayerError]
    losses: list[BlockLoss]
    nbytes: int
    """Of all files of the checkpoint."""
    seconds: float


def prepare(loaded: LoadedRecipe, source: Path) -> Prepared:
    """Check a recipe against a model and plan the run.

    Args:
        loaded: The recipe.
        source: Local folder of the 16-bit model.

    Raises:
        CheckpointError: If the model is incomplete or damaged.
        RecipeError: If the recipe does not fit the model, or its prompts cannot be read.
        UnsupportedModelError: If the family is unknown, or another than the recipe says.
    """
    recipe = loaded.recipe
    expected = get_family(recipe.model.family) if recipe.model.family is not None else None
    pipeline = open_pipeline(source)
    family = detect(pipeline)
    if expected is not None and expected.name != family.name:
        raise UnsupportedModelError(
            f"{loaded.path}: model.family: is {expected.name}, but {source} is a {family.name} model"
        )
    if recipe.model.task != family.task:
        raise UnsupportedModelError(
            f"{loaded.path}: model.task: {family.name} does {family.task}, not {recipe.model.task}"
        )
    for section in (recipe.calibration, recipe.compare, recipe.serve):
        family.sampling_for(recipe.sampling, section)
    prompts = _calibration_samples(loaded, family) if recipe.scheme.tuned else []
    return Prepared(loaded, family, make_plan(pipeline, family, recipe), prompts)


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
    on_progress: OnProgress = ignore,
) -> Quantized:
    """Carry out a prepared run and publish the checkpoint.

    Args:
        prepared: From `prepare`.
        output: Folder of the checkpoint; it appears complete and verified or not at all.
        device: Where tuning runs, e.g. ``cpu`` or ``cuda:0``.
        overwrite: Replace an existing output, after the new checkpoint has been verified.
        on_progress: Told of every step.

    Raises:
        CheckpointError: If the source holds NaN or infinity.
        OutputError: If the output exists, cannot be written, or holds the source.
        QuantizationError: If tuning fails, or the result does not match the plan.
    """
    started = time.monotonic()
    plan, recipe = prepared.plan, prepared.loaded.recipe
    if plan.pipeline.folder.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output}: holds the model that is to be quantized; give another --output")
    need_bytes = plan.nbytes_after + _SLACK_BYTES
    if recipe.scheme.tuned:  # what tuning leaves is there twice until the checkpoint is written
        need_bytes += sum(layer.nbytes for part in plan.components for layer in part.layers)
    with stage(output, overwrite=overwrite, need_bytes=need_bytes, marker=plan.pipeline.index_file) as staging:
        _check_finite(plan.pipeline, on_progress)
        losses: list[BlockLoss] = []
        packs = {part.component.name: round_to_nearest(part.component) for part in plan.components}
        if recipe.scheme.tuned:
            job = _job(prepared, device, staging.work / "tuned")
            losses = tune(job, staging.work, on_progress)
            packs = {part.component.name: _from_file(part, Path(job.result)) for part in plan.components}
        versions = library_versions()
        place_untouched(plan.pipeline, [*packs], staging.content)
        for part in plan.components:
            config = quantization_config(
                part, iters=recipe.scheme.iters, autoround_version=versions.get("auto-round", "none")
            )
            write_component(
                part,
                packs[part.component.name],
                prepared.family.quantized_config(part.component, config),
                staging.content / part.component.folder.relative_to(plan.pipeline.folder),
                max_shard_bytes=parse_size(recipe.export.max_shard_size),
                on_progress=on_progress,
            )
        errors = _verify(staging.content, plan, on_progress)
        seconds = time.monotonic() - started
        manifest = _manifest(prepared, errors, losses, versions, device, seconds, staging.content)
        (staging.content / "README.md").write_text(render_card(manifest), encoding="utf-8")
        manifest["files"] = hash_files(staging.content, on_progress)
        write_json(staging.content / MANIFEST, manifest)
        staging.publish(overwrite=overwrite)
    nbytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return Quantized(output, plan, errors, losses, nbytes, time.monotonic() - started)


def _check_finite(pipeline: Pipeline, on_progress: OnProgress) -> None:
    """Refuse weights with NaN or infinity before hours are spent on them."""
    import torch

    infos = [info for part in pipeline.components.values() for info in part.tensors.values()]
    for number, (info, tensor) in enumerate(read_tensors(infos), start=1):
        if info.dtype in _FLOATS and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{info.file}: {info.name}: holds NaN or infinity; copy the model again")
        on_progress(Progress("check", number, len(infos), info.name))


def _job(prepared: Prepared, device: str, result: Path) -> Job:
    recipe = prepared.loaded.recipe
    scheme = recipe.scheme
    layers = {}
    for part in prepared.plan.components:
        layers[part.component.name] = {
            **{
                layer.name: Layer(layer.scheme.bits, layer.scheme.group_size, layer.scheme.sym)
                for layer in part.layers
            },
            **{name: Layer(16, scheme.group_size, scheme.sym) for name in part.kept_in_blocks},
        }
    return Job(
        source=str(prepared.plan.pipeline.folder),
        family=prepared.family.name,
        layers=layers,
        default=Layer(scheme.bits, scheme.group_size, scheme.sym),
        prompts=prepared.prompts,
        dataset=recipe.calibration.dataset,
        nsamples=scheme.nsamples,
        seqlen=scheme.seqlen,
        call_kwargs=prepared.family.call_kwargs(prepared.family.sampling_for(recipe.sampling, recipe.calibration)),
        iters=scheme.iters,
        lr=scheme.lr,
        minmax_lr=scheme.minmax_lr,
        batch_size=scheme.batch_size,
        seed=scheme.seed,
        noise_seed=recipe.calibration.seed,
        device=device,
        result=str(result),
    )


def _from_file(part: ComponentPlan, result: Path) -> Pack:
    """Return a function that gives the packed tensors which tuning left in a file."""
    infos = read_header(result / f"{part.component.name}.safetensors")

    def pack_layer(layer: PlannedLayer) -> dict[str, Tensor]:
        missing = [name for name in layer.tensors if name not in infos]
        if missing:
            raise QuantizationError(f"auto-round left {layer.name} unquantized, against the plan")
        return {name: read_tensor(infos[name]) for name in layer.tensors}

    return pack_layer


def _verify(checkpoint: Path, plan: Plan, on_progress: OnProgress) -> list[LayerError]:
    result = verify(
        checkpoint,
        source=plan.pipeline.folder,
        planned={part.component.name: list(part.layers) for part in plan.components},
        on_progress=on_progress,
    )
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        error = QuantizationError(f"the result does not match the plan: {result.problems[0]}{more}")
        error.add_note("\n".join(result.problems))
        raise error
    return result.errors


def _manifest(
    prepared: Prepared,
    errors: list[LayerError],
    losses: list[BlockLoss],
    versions: dict[str, str],
    device: str,
    seconds: float,
    checkpoint: Path,
) -> dict[str, Any]:
    loaded, plan = prepared.loaded, prepared.plan
    described = plan.as_dict()
    for error in errors:
        described[error.component]["layers"][error.name] |= {
            "relative_l2": error.relative_l2,
            "rtn_relative_l2": error.rtn_relative_l2,
        }
    after = sum(component.nbytes for component in open_pipeline(checkpoint).components.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "family": plan.family,
        "source": {"id": _public_name(loaded.recipe.model.id), "revision": loaded.recipe.model.revision},
        "recipe": {
            "name": loaded.path.name,
            "sha256": loaded.sha256,
            "overrides": list(loaded.overrides),
            "effective": loaded.recipe.model_dump(mode="json"),
        },
        "samples": loaded.recipe.scheme.nsamples if loaded.recipe.scheme.tuned else 0,
        "plan": described,
        "block_losses": [vars(loss) for loss in losses],
        "sizes": {"before": plan.nbytes_before, "after": after},
        "versions": versions,
        "run": {"device": device, "threads": _threads(), "seconds": round(seconds, 1)},
    }


def _public_name(model_id: str) -> str:
    """Return a model's hub id, or the name of its folder without the path to it."""
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def _threads() -> int:
    import torch

    return torch.get_num_threads()
