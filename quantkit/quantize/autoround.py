"""The child process of `quantkit.quantize.tuning`: the only module that imports auto_round.

Run as ``python -m quantkit.quantize.autoround JOB DESCRIPTOR``. Only auto-round's tuning is used: packing and
writing are quantkit's own, so that what ends in the checkpoint is the plan and nothing else.

The child speaks JSON lines on the pipe it is given (progress, block losses, how it failed) and logs to its standard
output. It ends itself when its parent dies.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.families.base import Family
from quantkit.families.registry import get_family
from quantkit.quantize.tuning import Job, Layer
from quantkit.recipe.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOSS = re.compile(r"loss iter 0: (\S+) -> iter (\d+): (\S+)")
# What auto-round logs, at warning level, when it is about to do something else than it was asked.
_IGNORED = re.compile(r"will be ignored|is ignored|unrecognized|could not find blocks|not supported", re.IGNORECASE)


class _Gone(Exception):  # noqa: N818  (no error of a user's: a refusal of the child to go on)
    """auto-round did not do what it was asked."""


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


class _Follower(logging.Handler):
    """Turns auto-round's log into events, and its warnings about things it skips into a refusal."""

    def __init__(self, emit: Callable[..., None]) -> None:
        super().__init__()
        self._emit = emit
        self.component = ""
        self.block = ""
        self.refusal: str | None = None
        self.last_error = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if match := _LOSS.search(message):
            self._emit(
                "loss", component=self.component, block=self.block, before=float(match[1]), after=float(match[3])
            )
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
    from auto_round.algorithms.block_runner import register_diffusion_output
    from auto_round.calibration import diffusion as calibration
    from auto_round.compressors import orchestrator
    from safetensors.torch import save_file

    logging.getLogger("autoround").addHandler(follower)
    calibration.tqdm = _bar("calibrate", emit, follower)
    orchestrator.tqdm = _bar("tune", emit, follower)
    emit("progress", stage="load", done=0, total=1, detail=job.source)
    family = get_family(job.family)
    pipe = family.load(Path(job.source), torch.bfloat16)
    emit("progress", stage="load", done=1, total=1, detail=job.source)
    pipe.set_progress_bar_config(disable=True)
    for class_name, outputs in family.block_outputs.items():
        register_diffusion_output(class_name, list(outputs))
    prompts = job.prompts or _download_prompts(job, family)
    # auto-round collects garbage dozens of times; what is loaded by now need not be walked each time.
    gc.freeze()
    for component, layers in job.layers.items():
        follower.component = component
        model = getattr(pipe, component)
        blocks = [
            [f"{path}.{index}" for index in range(len(model.get_submodule(path)))]
            for path in family.blocks[component]
        ]
        tuner = AutoRound(
            _expose(pipe, component, family, prompts, job),
            scheme={**asdict(job.default), "data_type": "int"},
            alg_configs=SignRoundConfig(
                iters=job.iters, lr=job.lr, minmax_lr=job.minmax_lr, gradient_accumulate_steps=job.batch_size
            ),
            to_quant_block_names=blocks,
            layer_config={
                name: {"bits": 16} if layer.bits == 16 else asdict(layer)
                for name, layer in layers.items()
                if layer != job.default
            },
            dataset=[([str(index)], [index]) for index in range(job.nsamples)],
            nsamples=job.nsamples,
            batch_size=1,
            device_map=job.device,
            seed=job.seed,
            low_cpu_mem_usage=False,
            enable_torch_compile=False if job.device == "cpu" else None,
            calib_num_inference_steps=job.call_kwargs["num_inference_steps"],
        )
        tuner.quantize()
        if follower.refusal is not None:
            raise _Gone(follower.refusal)
        save_file(dict(_pack(model, layers)), Path(job.result) / f"{component}.safetensors")


def _expose(pipe: Any, component: str, family: Family, prompts: Sequence[Prompt], job: Job) -> Any:
    """Return a pipeline that has but one transformer, and that draws with the whole one when it is called.

    auto-round tunes ``transformer``, and whatever else has such a name with the same settings. Here every component
    has its own run and its own settings, and the calls are ours: auto-round would start every prompt from the same
    noise, know only part of the arguments, and decode pictures that nobody looks at.
    """
    import torch
    from diffusers import DiffusionPipeline

    class Exposed(DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, transformer: torch.nn.Module) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

        def __call__(self, indices: list[int], **_given: Any) -> None:
            for name, part in pipe.components.items():
                if name != component and isinstance(part, torch.nn.Module):
                    part.to(self.device)
            for index in indices:
                generator = torch.Generator("cpu").manual_seed(job.noise_seed + index)
                kwargs = family.prompt_kwargs(prompts[index])
                pipe(**kwargs, generator=generator, output_type="latent", **job.call_kwargs)

    return Exposed(getattr(pipe, component))


def _download_prompts(job: Job, family: Family) -> list[Prompt]:
    """Read a data set that auto-round knows by name."""
    from auto_round.compressors.diffusion.dataset import get_diffusion_dataloader

    loader, _ = get_diffusion_dataloader(
        job.dataset, bs=1, seed=job.seed, nsamples=job.nsamples, image_required=family.task == "i2v"
    )
    prompts = [Prompt(text, *(image for (image,) in images)) for _, (text,), *images in loader]
    if len(prompts) < job.nsamples:
        raise _Gone(
            f"{job.dataset} holds {len(prompts)} prompts, scheme.nsamples asks for {job.nsamples}; lower it"
        )
    return prompts[: job.nsamples]


def _pack(model: torch.nn.Module, layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    """Yield the packed tensors of every tuned layer, by full name."""
    import torch

    from quantkit.quantize.plan import PACKING_FORMAT
    from quantkit_runtime.config import Scheme
    from quantkit_runtime.format import pack

    for name, layer in layers.items():
        module: Any = model.get_submodule(name)
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
