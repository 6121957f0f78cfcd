"""One rank of the tests of parallel generation: runs jobs one after the other and writes what came out."""

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from repeated_work import RepeatedWork

from quantkit_runtime import load_model, load_pipeline
from quantkit_runtime.errors import ParallelError
from quantkit_runtime.graphs import record_calls
from quantkit_runtime.parallel import make_mesh, parallel_call
from quantkit_runtime.parallel.launch import joined
from quantkit_runtime.parallel.tensor import group_of


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def drop_guidance_after(step):
    """A callback as pipelines with a guidance interval have it: guidance pauses from a step on."""

    def callback(pipeline, index, _timestep, _tensors):
        if index == step:
            pipeline._guidance_scale = 1.0
            pipeline._guidance_scale_2 = 1.0
        return {}

    return callback


def other_prompt_after(step):
    """A callback that replaces the embeddings of both branches."""

    def callback(_pipeline, index, _timestep, tensors):
        if index != step:
            return {}
        return {name: tensors[name] * 0.5 for name in ("prompt_embeds", "negative_prompt_embeds")}

    return callback


def disturb_rank(rank, step):
    """A callback that does something else on one rank."""

    def callback(_pipeline, index, _timestep, tensors):
        return {"latents": tensors["latents"] + 1e-3} if _rank() == rank and index == step else {}

    return callback


def end_rank(rank, step):
    """A callback in which one rank dies."""

    def callback(_pipeline, index, _timestep, _tensors):
        if _rank() == rank and index == step:
            os._exit(9)
        return {}

    return callback


def slow_rank(rank, seconds):
    """A callback in which one rank lags behind."""

    def callback(_pipeline, _index, _timestep, _tensors):
        if _rank() == rank:
            time.sleep(seconds)
        return {}

    return callback


WARM_UP_ROUNDS = 10
CALLBACKS = {
    call.__name__: call for call in (drop_guidance_after, other_prompt_after, disturb_rank, end_rank, slow_rank)
}


def arguments_of(job):
    """Return the keyword arguments of the pipeline call that a job describes."""
    kwargs = dict(job["kwargs"])
    if _rank() == 1:
        kwargs |= job.get("on_rank_1", {})
    if "seed" in kwargs:
        kwargs["generator"] = torch.Generator("cpu").manual_seed(kwargs.pop("seed"))
    if "image" in kwargs:
        side = kwargs["image"]
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        kwargs["image"] = Image.fromarray(pixels)
    if "callback" in job:
        name, *rest = job["callback"]
        kwargs["callback_on_step_end"] = CALLBACKS[name](*rest)
        kwargs["callback_on_step_end_tensor_inputs"] = job.get("callback_inputs", ["latents"])
    return kwargs


def prepared(job, mesh=None, device="cpu"):
    """Load a job's pipeline; what its other keys name is turned on."""
    shared = None if mesh is None or job.get("ulysses") else mesh["tensor"]
    dtype = getattr(torch, job.get("dtype", "bfloat16"))
    pipe = load_pipeline(job["model"], device=device, dtype=dtype, tensor_parallel=shared)
    pipe.set_progress_bar_config(disable=True)
    if mesh is not None and job.get("ulysses"):
        split_tokens(pipe.transformer, job["mesh"])
    if mesh is not None and job.get("compile"):
        pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    if mesh is not None and job.get("recorded"):
        for name in ("transformer", "transformer_2"):
            if isinstance(denoiser := getattr(pipe, name, None), torch.nn.Module):
                record_calls(denoiser, name, RepeatedWork)
    if job.get("step_cache"):
        from diffusers import FirstBlockCacheConfig

        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=job["step_cache"]))
    return pipe


def split_tokens(transformer, shape):
    """Turn on diffusers' Ulysses attention along the mesh's second dimension.

    diffusers asks for an accelerator's number before it takes the mesh that it is given; a CPU has none.
    """
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    cfg, degree = shape
    mesh = init_device_mesh("cpu", (cfg, 1, degree), mesh_dim_names=("cfg", "ring", "ulysses"))
    count, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 1
    config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh["ring", "ulysses"])
    transformer.enable_parallelism(config=config)
    torch.accelerator.device_count = count


def result_of(output):
    """Return latents of any pipeline's output."""
    return output.images if hasattr(output, "images") else output.frames


def resident_bytes():
    """Return what this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_blocks(pipe):
    """Count how often the denoisers really run, seen from their first block."""
    counts = {"forwards": 0}

    def hook(*_args):
        counts["forwards"] += 1

    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            model = getattr(pipe, name)
            if hasattr(model, "bagel"):
                model.register_forward_hook(hook)  # its blocks read prompts, too
                continue
            blocks = getattr(model, "transformer_blocks", None) or model.blocks
            blocks[0].register_forward_hook(hook)
    return counts


def held_bytes(pipe):
    """Return the bytes of the denoiser on this rank."""
    return sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())


def shared_encoders(pipe):
    """Return the names of the classes of a pipeline's text encoders that share their weights with other ranks."""
    components = pipe.components.values()
    return sorted(type(model).__name__ for model in components if group_of(model) and model is not pipe.transformer)


def logits_of(job, mesh=None):
    """Return a language model's logits for some tokens, and the bytes of its decoder's layers."""
    shared = None if mesh is None else mesh["tensor"]
    model = load_model(job["model"], dtype=getattr(torch, job["dtype"]), tensor_parallel=shared)
    tokens = torch.arange(12).view(1, -1)
    writer = getattr(model, "thinker", getattr(model, "language_model", model))
    with torch.no_grad():
        if job.get("drawing"):  # BAGEL: every other token is its second expert's
            output = writer.model(writer.model.embed_tokens(tokens), latent=tokens % 2 == 1)
        else:
            output = writer(input_ids=tokens)
    logits = getattr(output, "logits", output)  # BAGEL gives nothing else
    layers = getattr(writer.model, "language_model", writer.model).layers
    return logits, sum(tensor.nbytes for tensor in layers.state_dict().values())


def run(jobs, folder, device="cpu"):
    """Run jobs in this rank; what came out of each is written to ``<name>-rank<rank>.pt``."""
    with joined(device) as mine:
        for job in jobs:
            cfg, tensor = job.get("mesh", (2, 1))
            made = _run(job, make_mesh(mine, cfg=cfg, tensor=tensor), mine)
            torch.save(made, Path(folder, f"{job['name']}-rank{dist.get_rank()}.pt"))
            dist.barrier()


def _run(job, mesh, device):
    if job.get("language"):
        logits, held = logits_of(job, mesh)
        return {"latents": logits, "held_bytes": held}
    pipe = prepared(job, mesh, device)
    counts = count_blocks(pipe)
    found = {}
    try:
        parallel = torch.no_grad()(pipe.__call__) if job.get("direct") else parallel_call(pipe, mesh)
        for round_ in range(job.get("repeat", 1)):
            output = parallel(**arguments_of(job), output_type="latent")
            if round_ == WARM_UP_ROUNDS:
                found["warm_bytes"] = resident_bytes()
        found["end_bytes"] = resident_bytes()
    except ParallelError as error:
        found["error"] = str(error)
    else:
        found["latents"] = result_of(output).cpu()
    return {**found, **counts, "held_bytes": held_bytes(pipe), "encoders": shared_encoders(pipe)}
