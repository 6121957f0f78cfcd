"""Calling a pipeline on several ranks: they agree on what is called, and are watched while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.agreement import Groups, check_same_arguments, check_same_latents, shared_seed
from quantkit_runtime.parallel.tensor import WATCHED, group_of

DENOISERS = ("transformer", "transformer_2", "unet")
CHECK_EVERY_STEPS = 5


class ParallelPipeline:
    """A pipeline that is called on several ranks at once.

    They share the weights of its denoisers (``load_pipeline(tensor_parallel=...)``) or their tokens (diffusers'
    context parallelism); which ranks those are is read from the denoisers.

    Args:
        pipeline: A diffusers pipeline, loaded on every rank.

    Raises:
        ParallelError: There is no process group, or the pipeline has no denoiser.
    """

    def __init__(self, pipeline: Any) -> None:
        if not dist.is_initialized():
            raise ParallelError("no process group: start the ranks with torchrun and call init_process_group first")
        found = {name: getattr(pipeline, name, None) for name in DENOISERS}
        self._denoisers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        if not self._denoisers:
            raise ParallelError(f"{type(pipeline).__name__}: has none of {', '.join(DENOISERS)}")
        self.pipeline = pipeline
        self._ranks: Groups = _groups_of(next(iter(self._denoisers.values())))

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline; every rank must make the same call, and gets the same result.

        Without ``generator`` all ranks use one seed that the first rank draws.

        Raises:
            ParallelError: The ranks were called with different arguments or have drifted apart, or the call cannot
                be run in parallel.
        """
        arguments = inspect.signature(type(self.pipeline).__call__).bind(self.pipeline, *args, **kwargs).arguments
        given = {name: value for name, value in arguments.items() if name != "self" and value is not None}
        check_same_arguments(given, self._ranks)
        if "generator" not in given:
            kwargs["generator"] = torch.Generator("cpu").manual_seed(shared_seed(self._ranks))
        watch = Watch(self._ranks)
        with self._wrapped(watch):
            output = self.pipeline(*args, **kwargs)
            watch.finish()
        return output

    @contextmanager
    def _wrapped(self, watch: Watch) -> Iterator[None]:
        """Put what watches, or does, the work of several ranks around the methods of the pipeline's parts."""
        scheduler = self.pipeline.scheduler
        with ExitStack() as stack:
            for module in self._denoisers.values():
                stack.enter_context(patched(module, WATCHED, True))
            stack.enter_context(patched(scheduler, "step", watch.wrap_step(scheduler)))
            yield


def _groups_of(denoiser: Any) -> Groups:
    """Return the groups of the ranks that run a denoiser together."""
    groups = [group_of(denoiser)]
    context = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)  # diffusers'
    if context is not None:
        groups += [context._ring_mesh.get_group(), context._ulysses_mesh.get_group()]
    return [group for group in groups if group is not None and dist.get_world_size(group) > 1]


@contextmanager
def patched(target: Any, name: str, replacement: Any) -> Iterator[None]:
    """Put something in the place of an attribute or a method of one object for a while."""
    own = vars(target)
    before = own.get(name)
    own[name] = replacement
    try:
        yield
    finally:
        if before is None:
            del own[name]  # what the class defines shows again
        else:
            own[name] = before


@dataclass
class Watch:
    """Follows the scheduler's steps and compares the latents across ranks now and then; one object per generation.

    Attributes:
        ranks: That must hold the same latents.
        step: Steps that have ended.
        before_step: Called with the latents that the scheduler is about to step.
    """

    ranks: Groups
    step: int = 0
    before_step: Callable[[Tensor | None], None] | None = None
    _latents: Tensor | None = None
    _suspicion: Tensor | None = None

    def suspect(self, differs: Tensor) -> None:
        """Note, without waiting for the device, that a guess turned out wrong if this bool scalar is true."""
        found = differs.to(torch.int64)
        self._suspicion = found if self._suspicion is None else torch.maximum(self._suspicion, found)

    def wrap_step(self, scheduler: Any) -> Callable[..., Any]:
        """Return what takes the place of the scheduler's ``step``."""
        original = scheduler.step
        signature = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.before_step is not None:
                self.before_step(signature.bind(*args, **kwargs).arguments.get("sample"))
            self.step += 1
            result = original(*args, **kwargs)
            self._latents = result[0] if isinstance(result, tuple) else result.prev_sample
            if self.step % CHECK_EVERY_STEPS == 0:
                self._check()
            return result

        return step

    def finish(self) -> None:
        """Compare the last latents, too."""
        if self.step % CHECK_EVERY_STEPS:
            self._check()

    def _check(self) -> None:
        assert self._latents is not None
        suspicion = self._suspicion
        if suspicion is None:
            suspicion = torch.zeros((), dtype=torch.int64, device=self._latents.device)
        check_same_latents(self._latents, suspicion, self.step, self.ranks)
