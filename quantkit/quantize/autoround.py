"""The child process of `quantkit.quantize.tuning`: the only module that imports auto_round.

Run as ``python -m quantkit.quantize.autoround JOB BLOCKS DESCRIPTOR``. Only auto-round's tuning is used: packing
and writing are quantkit's own, so that what ends in the checkpoint is the plan and nothing else.

The child speaks JSON lines on the pipe it is given (progress, tuned blocks, how it failed) and logs to its
standard output. It ends itself when its parent dies.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.families.base import DiffusionFamily
from quantkit.families.language import LanguageFamily
from quantkit.families.registry import get_family
from quantkit.quantize.drawing import expose
from quantkit.quantize.follower import Follower, silent_bar
from quantkit.quantize.packing import pack_layers, unpack_layers
from quantkit.quantize.resume import TunedBlock, TunedBlocks, random_state, restore_random_state
from quantkit.quantize.tuning import Job
from quantkit.recipe.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK_PARAMETERS = ("self", "block", "fp_inputs", "input_others", "fp_outputs", "q_inputs", "block_ctx")

Emit = Callable[..., None]


class _Gone(Exception):  # noqa: N818  (no error of a user's: a refusal of the child to go on)
    """auto-round did not do what it was asked."""


def _end_with_parent() -> None:
    # Not sys.stdin: a fork of this process, as auto-round makes to prepare a data set, would wait for its lock.
    while os.read(0, 1):
        pass
    os._exit(1)


def _run(job: Job, blocks: TunedBlocks, emit: Emit, follower: Follower) -> None:
    import gc

    import torch
    from auto_round.compressors import orchestrator

    logging.getLogger("autoround").addHandler(follower)
    orchestrator.tqdm = silent_bar(lambda _done, _total: None)
    family = get_family(job.family)
    prompts: Sequence[Any] = job.prompts
    if isinstance(family, DiffusionFamily):
        prompts = prompts or _download_prompts(job, family)
    emit("progress", stage="load", done=0, total=1, detail=job.source)
    model = family.load(Path(job.source), torch.bfloat16)
    emit("progress", stage="load", done=1, total=1, detail=job.source)
    # auto-round collects garbage dozens of times; what is loaded by now need not be walked each time.
    gc.freeze()
    _report_calibration(emit)
    if isinstance(family, LanguageFamily):
        _tune_language_model(model, family, job, blocks, emit, follower)
    elif isinstance(family, DiffusionFamily):
        _tune_pipeline(model, family, prompts, job, blocks, emit, follower)


def _tune_pipeline(
    pipe: Any,
    family: DiffusionFamily,
    prompts: Sequence[Any],
    job: Job,
    blocks: TunedBlocks,
    emit: Emit,
    follower: Follower,
) -> None:
    """Tune the components of a pipeline one after the other, while it draws the calibration images."""
    from auto_round.algorithms.block_runner import register_diffusion_output

    for class_name, outputs in family.block_outputs.items():
        register_diffusion_output(class_name, list(outputs))
    _keep_blocks({name: getattr(pipe, name) for name in job.layers}, job, blocks, emit, follower)
    for component in job.layers:
        _tune(
            expose(pipe, component, family, prompts, job),
            component,
            job,
            follower,
            to_quant_block_names=_list_blocks(getattr(pipe, component), job.block_lists[component]),
            dataset=[([str(index)], [index]) for index in range(job.nsamples)],
            calib_num_inference_steps=job.call_kwargs["num_inference_steps"],
        )


def _tune_language_model(
    whole: Any, family: LanguageFamily, job: Job, blocks: TunedBlocks, emit: Emit, follower: Follower
) -> None:
    """Tune a language model, while it reads the calibration texts or conversations.

    The modules of the loaded model may have other names than the checkpoint's layers; here they have theirs.
    """
    [component] = job.layers
    names = family.module_names(whole, [*job.layers[component], *job.block_lists[component]])
    layers = {names[name]: layer for name, layer in job.layers[component].items()}
    lists = [names[name] for name in job.block_lists[component]]
    job = replace(job, layers={component: layers}, block_lists={component: lists})
    model = family.text_model(whole)
    processor = family.load_processor(Path(job.source))
    done = itertools.count(1)

    def count(*_call: Any) -> None:
        emit("progress", stage="calibrate", done=next(done), total=job.nsamples)

    counting = model.register_forward_pre_hook(count)
    _keep_blocks({component: model}, job, blocks, emit, follower, {module: name for name, module in names.items()})
    samples = [family.tokenize(processor, sample, job.seqlen) for sample in job.prompts]
    tokenizer = getattr(processor, "tokenizer", None)
    _tune(
        model,
        component,
        job,
        follower,
        **({"tokenizer": processor} if tokenizer is None else {"tokenizer": tokenizer, "processor": processor}),
        to_quant_block_names=",".join(lists),
        dataset=job.dataset or samples,
        # auto-round drops texts of fewer tokens, and cuts those of a data set to this length.
        seqlen=job.seqlen if job.dataset else 1,
    )
    counting.remove()


def _tune(model: Any, component: str, job: Job, follower: Follower, **calibration: Any) -> None:
    from auto_round import AutoRound, SignRoundConfig

    tuner = AutoRound(
        model,
        scheme={**asdict(job.default), "data_type": "int"},
        alg_configs=SignRoundConfig(
            iters=job.iters, lr=job.lr, minmax_lr=job.minmax_lr, gradient_accumulate_steps=job.batch_size
        ),
        layer_config={
            name: {"bits": 16} if layer.bits == 16 else asdict(layer)
            for name, layer in job.layers[component].items()
            if layer != job.default
        },
        nsamples=job.nsamples,
        batch_size=1,
        device_map=",".join(job.devices),
        seed=job.seed,
        low_cpu_mem_usage=False,
        low_gpu_mem_usage=job.cache_on_host,
        enable_torch_compile=False if job.devices == ["cpu"] else None,
        **calibration,
    )
    tuner.quantize()
    if follower.refusal is not None:
        raise _Gone(follower.refusal)


def _list_blocks(model: torch.nn.Module, paths: Sequence[str]) -> list[list[str]]:
    """Return the names of the blocks in each module list; auto-round's own search takes other lists for blocks."""
    from auto_round.algorithms.block_runner import BlockForwardRunner

    lists: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    for name in {type(block).__name__ for blocks in lists.values() for block in blocks}:
        if name not in BlockForwardRunner.DIFFUSION_OUTPUT_CONFIGS:
            raise _Gone(f"it does not know what {name} returns; the family must say it in block_outputs")
    return [[f"{path}.{index}" for index in range(len(blocks))] for path, blocks in lists.items()]


def _download_prompts(job: Job, family: DiffusionFamily) -> list[Prompt]:
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


def _report_calibration(emit: Emit) -> None:
    """Make auto-round report each calibration image, and how much it has collected in the end."""
    from auto_round.calibration import diffusion, llm, mllm

    diffusion.tqdm = silent_bar(lambda done, total: emit("progress", stage="calibrate", done=done, total=total))
    for calibrator_class in (diffusion.DiffusionCalibrator, llm.LLMCalibrator, mllm.MLLMCalibrator):
        calibrator_class.calib = _reporting(calibrator_class.calib, emit)


def _reporting(collect: Callable[..., None], emit: Emit) -> Callable[..., None]:
    def collect_and_count(calibrator: Any, nsamples: int, batch_size: int) -> None:
        collect(calibrator, nsamples, batch_size)
        emit("cached", nbytes=_count_bytes(calibrator.inputs))

    return collect_and_count


def _count_bytes(values: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(values, Mapping):
        return sum(map(_count_bytes, values.values()))
    if isinstance(values, list | tuple):
        return sum(map(_count_bytes, values))
    return int(getattr(values, "nbytes", 0))


def _keep_blocks(
    components: Mapping[str, torch.nn.Module],
    job: Job,
    blocks: TunedBlocks,
    emit: Emit,
    follower: Follower,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Make auto-round keep each block that it has tuned, and not tune again those that were kept before.

    This stands in for the one call in which auto-round changes a block's weights. Before the call it computes the
    block's 16-bit output, after it, with the changed weights, the inputs of the next block; it does so for a block
    that was kept, too, so the blocks after it see what they would have seen.

    Args:
        components: What is tuned, by name.
        job: Names layers as the loaded modules are.
        blocks: Where blocks are kept, under the names of the checkpoint.
        emit: Told of every block.
        follower: Of auto-round's log.
        renamed: Module -> name in the checkpoint, for those that differ.
    """
    import torch
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    tune_block = SignRoundQuantizer.quantize_block
    if tuple(inspect.signature(tune_block).parameters)[: len(_BLOCK_PARAMETERS)] != _BLOCK_PARAMETERS:
        raise _Gone("this version tunes blocks in another way; install auto-round 0.16")
    kept = len(blocks.files)
    lists: list[Any] = [
        components[component].get_submodule(path) for component, paths in job.block_lists.items() for path in paths
    ]
    total = sum(map(len, lists))
    accelerators = [torch.device(device) for device in job.devices if device != "cpu"]
    indices = itertools.count()
    to_checkpoint = renamed or {}
    from_checkpoint = {name: module for module, name in to_checkpoint.items()}

    def take_up_or_tune(
        quantizer: Any,
        block: torch.nn.Module,
        fp_inputs: Any,
        input_others: Any,
        fp_outputs: Any,
        q_inputs: Any,
        block_ctx: Any,
        **options: Any,
    ) -> dict[str, Any]:
        if follower.refusal is not None:  # now, not hours later
            raise _Gone(follower.refusal)
        index, name = next(indices), block_ctx.block_name
        component = next((key for key, module in components.items() if module is block_ctx.model), None)
        if component is None:
            raise _Gone(f"{name} is in no component of the plan")
        layers = {layer: scheme for layer, scheme in job.layers[component].items() if layer.startswith(f"{name}.")}
        if index < kept:
            tuned, tensors = blocks.read(index)
            if (tuned.component, tuned.name) != (component, name):
                raise _Gone(f"the earlier run tuned {tuned.name} where now {name} is due; give --no-resume")
            unpack_layers(block_ctx.model, layers, _rename(tensors, from_checkpoint))
            restore_random_state(tuned.random, accelerators)
            emit("progress", stage="resume", done=index + 1, total=kept, detail=name)
        else:
            emit("progress", stage="tune", done=index, total=total, detail=name)
            tune_block(quantizer, block, fp_inputs, input_others, fp_outputs, q_inputs, block_ctx, **options)
            inputs = fp_inputs if q_inputs is None else q_inputs
            loss = follower.take_loss(_count_summed(quantizer, inputs, fp_outputs))
            tuned = TunedBlock(component, name, loss, random_state(accelerators))
            blocks.write(index, tuned, _rename(dict(pack_layers(block_ctx.model, layers)), to_checkpoint))
            result = "" if loss is None else f"loss {loss[0]:.3g} to {loss[1]:.3g}"
            emit("progress", stage="tune", done=index + 1, total=total, detail=name, result=result)
        before, after = tuned.loss or (None, None)
        emit("tuned", component=component, block=name, before=before, after=after, resumed=index < kept)
        return {}

    SignRoundQuantizer.quantize_block = take_up_or_tune


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors with their layers' names exchanged."""
    parts = {name: name.rpartition(".") for name in tensors}
    return {f"{names.get(layer, layer)}.{suffix}": tensors[name] for name, (layer, _, suffix) in parts.items()}


def _count_summed(quantizer: Any, inputs: Any, outputs: list[torch.Tensor]) -> int:
    """Return how many squared errors auto-round adds up to the loss that it logs.

    It divides by their number itself, but for steps of several inputs that it holds in a dictionary.
    """
    batch = quantizer.calibration_context.batch_size * quantizer.gradient_accumulate_steps
    if quantizer.gradient_accumulate_steps == 1 or isinstance(inputs, list):
        return 1
    return int(min(batch, len(outputs)) * outputs[0].numel())


def main(job_path: str, blocks: str, descriptor: str) -> int:
    """Run a job and report on the pipe; the return value is the exit code."""
    events = os.fdopen(int(descriptor), "w", encoding="utf-8", buffering=1)

    def emit(kind: str, **fields: Any) -> None:
        events.write(json.dumps({"kind": kind, **fields}) + "\n")

    threading.Thread(target=_end_with_parent, daemon=True).start()
    follower = Follower()
    out_of_memory = False
    try:
        _run(Job.read(Path(job_path)), TunedBlocks(Path(blocks)), emit, follower)
    except SystemExit as error:
        reason = follower.last_error or str(error)
    except (QuantkitError, _Gone) as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    except Exception as error:
        logging.getLogger("autoround").exception("the job failed")
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
        out_of_memory = _is_out_of_memory(error)
    else:
        return 0
    emit("failed", reason=follower.refusal or reason, out_of_memory=out_of_memory)
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # The CPU's allocator raises a bare RuntimeError.
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    # Without a return through the interpreter's end: auto-round leaves threads behind.
    os._exit(main(*sys.argv[1:]))
