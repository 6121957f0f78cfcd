"""A diffusion pipeline as auto-round gets to see it: one transformer, and calls that draw calibration images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.families.base import DiffusionFamily
from quantkit.quantize.tuning import Job
from quantkit.recipe.prompts import Prompt

if TYPE_CHECKING:
    import torch


def expose(pipe: Any, component: str, family: DiffusionFamily, prompts: Sequence[Prompt], job: Job) -> Any:
    """Return a pipeline that has but one transformer, and that draws with the whole one when it is called.

    auto-round tunes ``transformer``, and whatever else has such a name with the same settings. Here every component
    has its own run and its own settings, and the calls are ours: auto-round would start every prompt from the same
    noise, know only part of the arguments, and decode pictures that nobody looks at.

    Args:
        pipe: The whole pipeline.
        component: Name of the component to tune.
        family: Of the pipeline.
        prompts: As many as the job has samples; a call is given indices into them.
        job: Gives the other arguments of a call.
    """
    import torch
    from diffusers import DiffusionPipeline

    class Exposed(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
        def __init__(self, transformer: torch.nn.Module) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

        def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
            pipe.enable_model_cpu_offload(*args, **kwargs)

        def __call__(self, indices: list[int], **_given: Any) -> None:
            move_others(job.devices[0])
            for index in indices:
                generator = torch.Generator("cpu").manual_seed(job.noise_seed + index)
                kwargs = family.prompt_kwargs(prompts[index])
                pipe(**kwargs, generator=generator, output_type="latent", **job.call_kwargs)
            if indices[-1] == job.nsamples - 1:
                move_others("cpu")  # tuning needs the room

    def move_others(device: str) -> None:
        if job.cache_on_host:  # then auto-round has parts moved as they are called, see enable_model_cpu_offload
            return
        for name, part in pipe.components.items():
            if name != component and isinstance(part, torch.nn.Module):
                part.to(device)

    pipe.set_progress_bar_config(disable=True)
    return Exposed(getattr(pipe, component))
