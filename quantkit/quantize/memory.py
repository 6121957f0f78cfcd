"""The memory that tuning takes for calibration, estimated before any of it is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantizationError, RecipeError
from quantkit.families.base import Family
from quantkit.quantize.plan import Plan
from quantkit.recipe.schema import Recipe

# Beside the inputs of the first blocks: what the 16-bit block makes of its inputs, the inputs from the quantized
# blocks before it, and what it makes of those.
_COPIES_WHILE_TUNING = 3
# Of a device's memory; the rest is for activations, gradients and fragmentation.
_DEVICE_SHARE = 0.9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CalibrationMemory:
    """What tuning keeps in memory.

    Attributes:
        samples: Calibration images, videos, texts or conversations.
        calls: Runs of the component per sample: denoising steps times guidance branches.
        cached_nbytes: Inputs of the first block of every module list, all of them, as auto-round collects them.
        peak_nbytes: Those, and what goes through the block that is being tuned.
        model_nbytes: The 16-bit weights of the whole pipeline.
    """

    samples: int
    calls: int
    cached_nbytes: int
    peak_nbytes: int
    model_nbytes: int


def estimate_memory(plan: Plan, family: Family, recipe: Recipe) -> CalibrationMemory | None:
    """Estimate the memory of a tuned run.

    auto-round keeps the inputs of the first block of each module list, for every call of the component by every
    calibration sample; the inputs of later blocks replace those of earlier ones. Components are tuned one after the
    other, so the largest counts.

    Returns:
        None if the family cannot tell how large its blocks' inputs are.

    Raises:
        RecipeError: If a component would get no inputs at all.
    """
    sampling = family.sampling_for(recipe.sampling, recipe.calibration)
    samples, max_tokens = recipe.scheme.nsamples, recipe.scheme.seqlen
    largest: CalibrationMemory | None = None
    for part in plan.components:
        inputs = family.count_block_inputs(plan.source, part.component.name, sampling, max_tokens)
        if inputs is None:
            return None
        if inputs.calls == 0:
            raise RecipeError(
                f"calibration.num_inference_steps: {sampling.num_inference_steps} leaves {part.component.name} "
                "without a step; give more"
            )
        cached = samples * inputs.calls * len(part.blocks) * (inputs.passed_nbytes + inputs.shared_nbytes)
        peak = cached + samples * inputs.calls * _COPIES_WHILE_TUNING * inputs.passed_nbytes
        if largest is None or peak > largest.peak_nbytes:
            largest = CalibrationMemory(samples, inputs.calls, cached, peak, plan.nbytes_before)
    return largest


def keys_to_lower(family: Family, recipe: Recipe, *, cached: bool) -> list[str]:
    """Return the recipe's keys by which tuning takes less memory, the first ones first.

    Args:
        family: Of the model.
        recipe: The recipe.
        cached: Whether the memory in question holds cached inputs, or only works on a block.
    """
    sizes = ["height", "width", "num_frames", "max_sequence_length"]
    given = family.sampling_for(recipe.sampling, recipe.calibration).given()
    keys = [f"calibration.{key}" for key in sizes if key in given]
    if family.task == "chat":
        return ["scheme.seqlen", "scheme.nsamples"] if cached else ["scheme.seqlen"]
    if not cached:
        return keys
    guidance = "true_cfg_scale" if "true_cfg_scale" in given else "guidance_scale"
    branches = [f"calibration.{guidance}"] if float(given.get(guidance, 0)) > 1 else []
    return ["scheme.nsamples", "calibration.num_inference_steps", *branches, *keys]


def check_memory(memory: CalibrationMemory, keys: Sequence[str], *, cache_on_host: bool) -> None:
    """Refuse a run that this machine's memory cannot hold.

    Args:
        memory: The estimate.
        keys: What makes it smaller, from `keys_to_lower`.
        cache_on_host: Whether blocks are tuned from the host's memory, or the host only collects inputs.

    Raises:
        QuantizationError: If it does not fit; the message names what to lower.
    """
    available = available_memory()
    need = memory.model_nbytes + (memory.peak_nbytes if cache_on_host else memory.cached_nbytes)
    if available is not None and need > available:
        raise QuantizationError(
            f"calibration needs about {need / 1e9:.1f} GB of memory for {memory.samples} samples x {memory.calls} "
            f"calls, {available / 1e9:.1f} GB are available; lower {' or '.join(keys)}"
        )


def cache_fits(memory: CalibrationMemory | None, device: str) -> bool:
    """Say whether the whole pipeline and its cached inputs fit on the device, which is faster.

    Args:
        memory: The estimate; None where there is none.
        device: E.g. ``cpu`` or ``cuda:0``.
    """
    import torch

    if device == "cpu":
        return True
    ask = getattr(torch.get_device_module(device), "get_device_properties", None)
    if memory is None or ask is None:
        return False
    return bool(memory.model_nbytes + memory.peak_nbytes <= _DEVICE_SHARE * ask(device).total_memory)


def available_memory() -> int | None:
    """Return the bytes of memory that this process may still take, or None where the system does not say."""
    try:
        available = int(_fields(Path("/proc/meminfo"))["MemAvailable:"]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux, or one that counts otherwise
        return None
    try:  # a container's own limit; page cache makes way
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = _fields(_CGROUP / "memory.stat")
        return min(available, limit - int(used["anon"]) - int(used["shmem"]))
    except (OSError, KeyError, ValueError):  # no container, or no limit
        return available


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="ascii").splitlines()
    return {words[0]: words[1] for words in map(str.split, lines)}
