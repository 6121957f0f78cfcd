"""What the tuning process is told to do, and what decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.checkpoint import ModelFolder, walk_files
from quantkit.families.base import Family
from quantkit.quantize.hashes import hash_file
from quantkit.quantize.memory import keys_to_lower
from quantkit.quantize.plan import Plan
from quantkit.quantize.progress import OnProgress, Progress
from quantkit.quantize.resume import Identity
from quantkit.quantize.tuning import Job, Layer
from quantkit.recipe.conversations import Conversation
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Recipe

_VERSIONS = ("quantkit", "auto-round", "torch", "transformers", "diffusers")


def make_job(
    plan: Plan,
    family: Family,
    recipe: Recipe,
    prompts: Sequence[Prompt | Conversation],
    *,
    devices: Sequence[str],
    cache_on_host: bool,
) -> Job:
    """Write down all that the tuning process needs to know.

    Args:
        plan: Gives the layers.
        family: Of the model.
        recipe: Gives the settings.
        prompts: For calibration; empty if the recipe names a data set.
        devices: See `quantkit.quantize.devices`.
        cache_on_host: Whether cached inputs stay in the host's memory.
    """
    scheme = recipe.scheme
    layers = {}
    for part in plan.components:
        layers[part.component.name] = {
            **{
                layer.name: Layer(layer.scheme.bits, layer.scheme.group_size, layer.scheme.sym)
                for layer in part.layers
            },
            **{name: Layer(16, scheme.group_size, scheme.sym) for name in part.kept_in_blocks},
        }
    return Job(
        source=str(plan.source.folder),
        family=family.name,
        layers=layers,
        block_lists={part.component.name: list(part.blocks) for part in plan.components},
        default=Layer(scheme.bits, scheme.group_size, scheme.sym),
        prompts=list(prompts),
        dataset=recipe.calibration.dataset,
        nsamples=scheme.nsamples,
        seqlen=scheme.seqlen,
        call_kwargs=family.call_kwargs(family.sampling_for(recipe.sampling, recipe.calibration)),
        iters=scheme.iters,
        lr=scheme.lr,
        minmax_lr=scheme.minmax_lr,
        batch_size=scheme.batch_size,
        seed=scheme.seed,
        noise_seed=recipe.calibration.seed,
        devices=list(devices),
        cache_on_host=cache_on_host,
        memory_keys=keys_to_lower(family, recipe, cached=not cache_on_host or list(devices) == ["cpu"]),
    )


def identify(job: Job, source: Mapping[str, str], versions: Mapping[str, str]) -> Identity:
    """Return what decides the result of a job, by the keys that users know it by.

    Args:
        job: The job.
        source: From `fingerprint`.
        versions: Of the installed libraries.
    """
    prompts = hashlib.sha256()
    for sample in job.prompts:
        prompts.update(_describe(sample).encode())
    return {
        **{
            f"scheme.{key}": getattr(job, key)
            for key in ("iters", "lr", "minmax_lr", "batch_size", "nsamples", "seqlen", "seed")
        },
        **{f"calibration.{key}": value for key, value in job.call_kwargs.items()},
        "calibration.seed": job.noise_seed,
        "calibration.dataset": job.dataset,
        "calibration.prompts": f"sha256 {prompts.hexdigest()}",
        **{
            f"layers.{component}.{name}": f"{layer.bits} bit, groups of {layer.group_size}, sym {layer.sym}"
            for component, layers in job.layers.items()
            for name, layer in layers.items()
        },
        **{f"source.{name}": f"sha256 {digest}" for name, digest in source.items()},
        **{f"versions.{name}": versions.get(name) for name in _VERSIONS},
        "device": ",".join(device.partition(":")[0] for device in job.devices),
    }


def _describe(sample: Prompt | Conversation) -> str:
    """Return what a calibration sample holds, files by their sha256."""
    if isinstance(sample, Prompt):
        return f"{sample.text}\n{'' if sample.image is None else hash_file(Path(sample.image))}\n"
    described = []
    for message in sample:
        for part in message["content"]:
            kind = part["type"]
            held = part[kind] if kind == "text" else hash_file(Path(part[kind]))
            described.append((message["role"], kind, held))
    return json.dumps(described)


def fingerprint(source: ModelFolder, on_progress: OnProgress) -> dict[str, str]:
    """Return the sha256 of every file of the source that a loaded pipeline depends on, by relative path."""
    folders = [component.folder for component in source.components.values()]
    index = source.folder / source.index_file
    paths = dict.fromkeys([index, *(path for folder in folders for path in walk_files(folder))])
    hashes = {}
    for number, path in enumerate(paths, start=1):
        name = path.relative_to(source.folder).as_posix()
        hashes[name] = hash_file(path)
        on_progress(Progress("fingerprint", number, len(paths), name))
    return hashes
