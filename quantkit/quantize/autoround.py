"""The child process of `quantkit.quantize.tuning`: the only module that imports auto_round.

Run as ``python -m quantkit.quantize.autoround JOB DESCRIPTOR``. Only auto-round's tuning is used: packing and
writing are quantkit's own, so that what ends in the checkpoint is the plan and nothing else.

The child speaks JSON lines on the pipe it is given (progress, block losses, how it failed) and logs to its standard
output. It ends itself when its parent dies.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.families.language import LanguageFamily
from quantkit.families.registry import get_family
from quantkit.quantize.tuning import Job, Layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOSS = re.compile(r"loss iter 0: (\S+) -> iter (\d+): (\S+)")
# What auto-round logs, at warning level, when it is about to do something else than it was asked.
_IGNORED = re.compile(
    "will be ignored|is ignored|unrecognized|could not find blocks|not supported|forward pass failed|"
    "insufficient number of samples",
    re.IGNORECASE,
)


class _Gone(Exception):  # noqa: N818  (no error of a user's: a refusal of the child to go on)
    """auto-round did not do what it was asked."""


def _end_with_parent() -> None:
    # Not sys.stdin: a fork of this process, as auto-round makes to prepare a data set, would wait for its lock.
    while os.read(0, 1):
        pass
    os._exit(1)


class _Follower(logging.Handler):
    """Turns auto-round's log into events, and its warnings about things it skips into a refusal."""

    def __init__(self, emit: Callable[..., None]) -> None:
        super().__init__()
        self._emit = emit
        self.block = ""
        self.refusal: str | None = None
        self.last_error = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if match := _LOSS.search(message):
            self._emit("loss", block=self.block, before=float(match[1]), after=float(match[3]))
        if record.levelno >= logging.WARNING and _IGNORED.search(message) and self.refusal is None:
            self.refusal = message
        if record.levelno >= logging.ERROR:
            self.last_error = message


def _bar(stage: str, emit: Callable[..., None], follower: _Follower) -> type:
    """Return a silent progress bar class that reports each update; auto-round has no callback of its own."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float = 1) -> None:
            super().update(n)
            emit("progress", stage=stage, done=int(self.n), total=int(self.total or 0), detail=follower.block)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            if desc and desc.startswith("Quantizing ") and desc != "Quantizing done":
                follower.block = desc.removeprefix("Quantizing ")
            super().set_description(desc, refresh)

    return Bar


def _run(job: Job, emit: Callable[..., None], follower: _Follower) -> None:
    import gc

    import torch
    from auto_round import AutoRound, SignRoundConfig
    from auto_round.compressors import orchestrator
    from safetensors.torch import save_file

    logging.getLogger("autoround").addHandler(follower)
    orchestrator.tqdm = _bar("tune", emit, follower)
    emit("progress", stage="load", done=0, total=1, detail=job.source)
    family = get_family(job.family)
    loaded = family.load(Path(job.source), torch.bfloat16)
    emit("progress", stage="load", done=1, total=1, detail=job.source)
    renamed: Mapping[str, str] = {}
    if isinstance(family, LanguageFamily):
        tuned = family.text_model(loaded)
        components = dict.fromkeys(job.layers, tuned)
        renamed = family.module_names(loaded, (name for layers in job.layers.values() for name in layers))
        blocks = (block for blocks in family.blocks.values() for block in blocks)
        calibration = _calibrate_by_reading(family, tuned, job, emit)
        calibration["to_quant_block_names"] = ",".join(family.module_names(loaded, blocks).values())
    else:
        tuned = loaded
        components = {name: getattr(loaded, name) for name in job.layers}
        calibration = _calibrate_by_drawing(loaded, job, _bar("calibrate", emit, follower))
    layer_config = {
        renamed.get(name, name): {"bits": 16} if layer.bits == 16 else asdict(layer)
        for layers in job.layers.values()
        for name, layer in layers.items()
        if layer != job.default
    }
    # auto-round collects garbage dozens of times; what is loaded by now need not be walked each time.
    gc.freeze()
    tuner = AutoRound(
        tuned,
        scheme={**asdict(job.default), "data_type": "int"},
        alg_configs=SignRoundConfig(
            iters=job.iters, lr=job.lr, minmax_lr=job.minmax_lr, gradient_accumulate_steps=job.batch_size
        ),
        layer_config=layer_config,
        nsamples=job.nsamples,
        batch_size=1,
        device_map=job.device,
        seed=job.seed,
        low_cpu_mem_usage=False,
        enable_torch_compile=False if job.device == "cpu" else None,
        **calibration,
    )
    tuner.quantize()
    if follower.refusal is not None:
        raise _Gone(follower.refusal)
    for component, layers in job.layers.items():
        packed = dict(_pack(components[component], layers, renamed))
        save_file(packed, Path(job.result) / f"{component}.safetensors")


def _calibrate_by_drawing(pipe: Any, job: Job, bar: type) -> dict[str, Any]:
    """Let a pipeline draw the calibration images; return what `AutoRound` is to be told of it."""
    import torch
    from auto_round.calibration import diffusion

    diffusion.tqdm = bar
    pipe.set_progress_bar_config(disable=True)
    seeds = iter(range(job.noise_seed, job.noise_seed + job.nsamples))

    def draw(pipeline: Any, prompts: list[str], **_given: Any) -> None:
        # auto-round would start every prompt from the same noise, and decode images that nobody looks at.
        generator = torch.Generator("cpu").manual_seed(next(seeds))
        pipeline(prompts, generator=generator, output_type="latent", **job.call_kwargs)

    pipe._autoround_pipeline_fn = draw
    return {
        "dataset": job.dataset or [([str(index)], [prompt]) for index, prompt in enumerate(job.prompts)],
        "calib_num_inference_steps": job.call_kwargs["num_inference_steps"],
        "guidance_scale": job.call_kwargs.get("guidance_scale", 1.0),
    }


def _calibrate_by_reading(
    family: LanguageFamily, model: torch.nn.Module, job: Job, emit: Callable[..., None]
) -> dict[str, Any]:
    """Let a model read the calibration samples; return what `AutoRound` is to be told of it."""
    processor = family.load_processor(Path(job.source))
    done = itertools.count(1)

    def count(*_call: Any) -> None:
        emit("progress", stage="calibrate", done=next(done), total=job.nsamples, detail="")

    model.register_forward_pre_hook(count)
    samples = [family.tokenize(processor, sample, job.seqlen) for sample in job.prompts]
    tokenizer = getattr(processor, "tokenizer", None)
    return {
        **({"tokenizer": processor} if tokenizer is None else {"tokenizer": tokenizer, "processor": processor}),
        "dataset": job.dataset or samples,
        # auto-round drops texts of fewer tokens, and cuts those of a data set to this length.
        "seqlen": job.seqlen if job.dataset else 1,
    }


def _pack(
    model: torch.nn.Module, layers: Mapping[str, Layer], renamed: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the packed tensors of every tuned layer, by full name in the checkpoint."""
    import torch

    from quantkit.quantize.plan import PACKING_FORMAT
    from quantkit_runtime.config import Scheme
    from quantkit_runtime.format import pack

    for name, layer in layers.items():
        module: Any = model.get_submodule(renamed.get(name, name))
        scale = getattr(module, "scale", None)
        if (scale is None) != (layer.bits == 16):
            raise _Gone(f"{name} was {'not ' if scale is None else ''}tuned, against the plan")
        if scale is None:
            continue
        scheme = Scheme(layer.bits, layer.group_size, layer.sym, packing_format=PACKING_FORMAT)
        weight = module.weight.detach().cpu()
        rows = weight.shape[0]
        scales = scale.detach().cpu().reshape(rows, -1).to(torch.float16)
        zero = module.zp
        zeros = zero.detach().cpu().reshape(rows, -1).float() if isinstance(zero, torch.Tensor) else float(zero)
        # The tuned weight is scale * (code - zero), rounded to the model's dtype: dividing gives the code back.
        levels = weight.float().view(rows, scales.shape[1], -1) / scales.float().unsqueeze(-1)
        offsets = zeros.unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
        codes = (levels + offsets).round().clamp(0, scheme.max_code).to(torch.uint8).view_as(weight)
        stored = zeros.t().to(torch.int32).contiguous() if isinstance(zeros, torch.Tensor) else None
        for suffix, tensor in pack(codes, scales.t().contiguous(), stored, scheme).items():
            yield f"{name}.{suffix}", tensor


def main(job_path: str, descriptor: str) -> int:
    """Run a job and report on the pipe; the return value is the exit code."""
    events = os.fdopen(int(descriptor), "w", encoding="utf-8", buffering=1)

    def emit(kind: str, **fields: Any) -> None:
        events.write(json.dumps({"kind": kind, **fields}) + "\n")

    threading.Thread(target=_end_with_parent, daemon=True).start()
    follower = _Follower(emit)
    try:
        _run(Job.read(Path(job_path)), emit, follower)
    except SystemExit as error:
        reason = follower.last_error or str(error)
    except (QuantkitError, _Gone) as error:
        reason = str(error)
    except Exception as error:
        logging.getLogger("autoround").exception("the job failed")
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
    else:
        return 0
    emit("failed", reason=follower.refusal or reason)
    return 1


if __name__ == "__main__":
    # Without a return through the interpreter's end: auto-round leaves threads behind.
    os._exit(main(*sys.argv[1:]))
