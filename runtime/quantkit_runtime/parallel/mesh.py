"""The ranks of a run in rows and columns: guidance branches by shares of the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.call import ParallelPipeline
from quantkit_runtime.parallel.cfg import CfgParallel


def make_mesh(device: torch.device, *, cfg: int = 1, tensor: int = 1) -> DeviceMesh:
    """Return the mesh of all ranks, with dimensions ``cfg`` and ``tensor``; neighbours share weights.

    Args:
        device: Of this rank.
        cfg: Guidance branches that run at the same time: 1 or 2.
        tensor: Ranks that share the weights of one denoiser.

    Raises:
        ParallelError: There are more or fewer ranks, or no process group.
    """
    if not dist.is_initialized():
        raise ParallelError("no process group: start the ranks with torchrun and call init_process_group first")
    if (world := dist.get_world_size()) != cfg * tensor:
        raise ParallelError(
            f"{cfg} branches by {tensor} shares of the weights take {cfg * tensor} ranks, not {world}"
        )
    names, backend = ("cfg", "tensor"), dist.get_backend()
    # Where CUDA is there, a mesh adds nccl to gloo unless told; it would refuse ranks that share an accelerator.
    only: Any = dict.fromkeys(names, backend) if backend == "gloo" else None
    return init_device_mesh(device.type, (cfg, tensor), mesh_dim_names=names, backend_override=only)


def parallel_call(pipeline: Any, mesh: DeviceMesh) -> ParallelPipeline:
    """Return what calls a pipeline on all ranks of a mesh.

    Args:
        pipeline: Loaded with ``load_pipeline(..., tensor_parallel=mesh["tensor"])``.
        mesh: From `make_mesh`.
    """
    cfg = mesh["cfg"]
    return ParallelPipeline(pipeline) if cfg.size() == 1 else CfgParallel(pipeline, cfg.get_group())
