"""What cfg_parallel.py runs in every rank: generating in each way, timed."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from guidance_clock import Clock
from guidance_models import load
from guidance_ways import Settings, Variant

WARM_UP = 1


def measure(folder: str, settings: Settings, ways: list[Variant]) -> None:
    """Run in a rank: generate in every way, and leave what the first rank found in a file.

    Small models take turns, round by round, so that other work on the machine slows all of them alike; large ones
    are loaded one after the other.
    """
    import torch
    import torch.distributed as dist

    from quantkit_runtime.parallel.launch import joined

    torch.set_num_threads(1)
    with joined(settings.device) as device, torch.no_grad():
        runs = {way.name: Run(folder, settings, way, device) for way in ways}
        turns = range(settings.rounds + WARM_UP)
        if settings.model == "demo":
            for run in runs.values():
                run.load()
            for turn in turns:
                for run in runs.values():
                    run.generate(turn)
        else:
            for run in runs.values():
                run.load()
                for turn in turns:
                    run.generate(turn)
                run.unload()
        if dist.get_rank() == 0:
            found = {name: run.found() for name, run in runs.items()}
            Path(folder, "rank0.json").write_text(json.dumps(found), encoding="utf-8")


class Run:
    """One variant on this rank; ranks that it has no use for wait."""

    def __init__(self, folder: str, settings: Settings, way: Variant, device: Any) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        self._folder, self._settings, self._way, self._device = folder, settings, way, device
        ranks = torch.arange(way.ranks).view(way.cfg, way.tensor)
        # As in make_mesh, but of some of the ranks: those that share an accelerator cannot have nccl beside gloo.
        only = (("gloo", None),) * 2 if dist.get_backend() == "gloo" else None
        self._mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("cfg", "tensor"), backend_override=only)
        self._takes_part = dist.get_rank() < way.ranks
        self._clock = Clock(device, watch=not settings.compile)
        self._weight_bytes = 0
        self._peak_bytes: int | None = None

    def load(self) -> None:
        """Load the model."""
        from quantkit_runtime.parallel import parallel_call

        reset_peak(self._device)
        if not self._takes_part:
            return
        pipe, self._arguments = load(self._folder, self._settings, self._way, self._device, self._mesh)
        if self._settings.compile:
            pipe.transformer.compile_repeated_blocks()
        self._call = parallel_call(pipe, self._mesh) if self._way.ranks > 1 else pipe
        self._weight_bytes = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())

    def generate(self, turn: int) -> None:
        """Generate once; the first turn warms up."""
        import torch
        import torch.distributed as dist

        if self._takes_part:
            size = self._settings.size
            self._clock.start(count=turn >= WARM_UP)
            with self._clock.watching_exchange():
                latents = self._call(
                    **self._arguments, height=size, width=size, num_inference_steps=self._settings.steps,
                    true_cfg_scale=2.0, generator=torch.Generator().manual_seed(turn),
                    callback_on_step_end=self._clock.step, output_type="latent",
                ).images  # fmt: skip
            if not bool(latents.isfinite().all()):
                raise ValueError(f"{self._way.name}: the latents are not finite")
        dist.barrier()

    def unload(self) -> None:
        """Let go of the model."""
        import torch

        self._peak_bytes = peak_bytes(self._device)
        self._call = self._arguments = None
        gc.collect()  # a pipeline is in cycles, which would keep its weights in the memory that the next one wants
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()

    def found(self) -> dict[str, Any]:
        """Return times and sizes, JSON-ready."""
        import torch.distributed as dist

        return {
            "times": self._clock.times(),
            "rounds_ms": self._clock.rounds(),
            "weight_bytes": self._weight_bytes,
            "peak_bytes": self._peak_bytes,
            "device": name_of(self._device),
            "collectives": dist.get_backend(),
        }


def reset_peak(device: Any) -> None:
    """Begin to measure the most memory anew."""
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_bytes(device: Any) -> int | None:
    """Return the most memory that tensors of this process took on an accelerator."""
    import torch

    return None if device.type == "cpu" else int(torch.get_device_module(device).max_memory_allocated(device))


def name_of(device: Any) -> str:
    """Return what the device is called."""
    import torch

    if device.type == "cpu":
        return "one CPU core per rank"
    return str(torch.get_device_module(device).get_device_name(device))
