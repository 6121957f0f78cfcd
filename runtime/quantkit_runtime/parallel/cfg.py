"""CFG-parallel: both guidance branches of an unmodified diffusers pipeline at the same time, on two ranks.

Classifier-free guidance calls the denoiser twice per step, conditional and unconditional. Every rank runs the whole
pipeline; only the denoiser's ``forward`` and the scheduler's ``step`` are wrapped. In the first step both ranks
compute both calls and learn how the second differs from the first: which inputs the two share (latents, timestep),
and which are the second's own (prompt embeddings), constant from step to step. From then on the second rank answers
the *first* call by computing the *second*, whose inputs it knows, while the first rank computes the first; they
exchange the results, and the second call returns what is already there. So

- a pipeline never sees a value that is not final, whatever it does between the two calls (cast, copy, combine);
- nothing depends on how a pipeline names its branches;
- what the second call is really given is compared with what was foreseen: where it differs (a callback replaced the
  prompt embeddings) both ranks compute it anew, and guidance that pauses is followed;
- both ranks hold the same bits and step the same scheduler, which a checksum watches.

Pipelines that put both branches into one call of twice the batch are recognised by that, and the batch is split;
where guidance pauses, the batch is single, and both ranks compute it.

The first step takes as long as on one rank, so N steps take the time of (N + 1) / 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.call import ParallelPipeline, Watch, patched
from quantkit_runtime.parallel.snapshot import State, same, snapshot, thaw


class CfgParallel(ParallelPipeline):
    """A pipeline whose two guidance branches run on the two ranks of a group.

    Where a branch is itself run by several ranks that share the weights (``load_pipeline(tensor_parallel=...)``),
    each of them exchanges with its counterpart.

    Args:
        pipeline: A diffusers pipeline, loaded on every rank.
        group: Process group of two ranks; None is the default group.

    Raises:
        ParallelError: The group has not two ranks, or the pipeline has no denoiser.
    """

    def __init__(self, pipeline: Any, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(pipeline)
        if (size := dist.get_world_size(group)) != 2:
            raise ParallelError(f"CFG-parallel takes a group of 2 ranks, one for each branch, not {size}")
        self._group = group
        self._ranks = (group, *self._ranks)

    @contextmanager
    def _wrapped(self, watch: Watch) -> Iterator[None]:
        branches = _Branches(self._group, watch)
        with ExitStack() as stack:
            for module in self._denoisers.values():
                stack.enter_context(patched(module, "forward", branches.wrap_forward(module)))
                if hasattr(module, "cache_context"):
                    stack.enter_context(patched(module, "cache_context", branches.wrap_context(module)))
            watch.before_step = branches.end_step
            stack.enter_context(super()._wrapped(watch))
            yield


Context = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of ``cache_context``, under which diffusers keeps step caches apart."""


@dataclass
class _Call:
    """One call of a denoiser: snapshots of its inputs by parameter name, and its cache context."""

    inputs: dict[str, Any]
    context: Context | None

    def arguments(self) -> dict[str, Any]:
        """Return the inputs as a call takes them."""
        return {name: thaw(value) for name, value in self.inputs.items()}


@dataclass
class _Pair:
    """What the first step taught about the second call.

    Attributes:
        own: Inputs of the second call that are not the first's.
        context: Cache context of the second call, its keyword arguments aside.
    """

    own: dict[str, Any]
    context: tuple[Any, ...] | None


@dataclass
class _Branches:
    """Follows the calls within each step; one object per generation."""

    group: dist.ProcessGroup | None
    watch: Watch
    calls: list[_Call] = field(default_factory=list)
    pair: _Pair | None = None
    batch: int | None = None  # of the latents, where one call of twice as many holds both branches
    ready: tuple[_Call, Any] | None = None  # what the second call should be, and its result
    context: Context | None = None
    contexts: dict[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    """``cache_context`` of each denoiser."""

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def wrap_context(self, module: nn.Module) -> Callable[..., Any]:
        original: Any = module.cache_context
        self.contexts[module] = original

        @contextmanager
        def cache_context(*args: Any, **kwargs: Any) -> Iterator[None]:
            self.context = (args, kwargs)
            try:
                with original(*args, **kwargs):
                    yield
            finally:
                self.context = None

        return cache_context

    def wrap_forward(self, module: nn.Module) -> Callable[..., Any]:
        original = module.forward
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            call = _Call({name: snapshot(value) for name, value in arguments.items()}, self.context)
            self.calls.append(call)
            if self.batch is not None:
                is_guided = _denoised(call).shape[0] == 2 * self.batch
                return self._split(original, call) if is_guided else original(*args, **kwargs)
            if len(self.calls) == 1 and self.pair is not None:
                return self._both(module, original, call)
            if len(self.calls) == 2 and self.ready is not None:
                foreseen, result = self.ready
                self.ready = None
                if self._is_as_foreseen(call, foreseen):
                    return result
                self.pair = None  # learn again: the second call has new inputs
            return original(*args, **kwargs)

        return forward

    def end_step(self, latents: Tensor | None) -> None:
        """Learn from the calls of a step, before the scheduler goes on."""
        if len(self.calls) == 2 and self.pair is None and self.batch is None:
            self.pair = self._learn(*self.calls)
        elif len(self.calls) == 1 and self.watch.step == 0:
            if latents is not None and _denoised(self.calls[0]).shape[0] == 2 * latents.shape[0]:
                self.batch = latents.shape[0]
            else:
                raise ParallelError(
                    "guidance is off: the denoiser is called once per step, so there is no second branch to run at "
                    "the same time; turn guidance on (for FLUX true_cfg_scale above 1 and a negative prompt), or "
                    "run independent replicas"
                )
        elif len(self.calls) == 1 and self.ready is not None:
            self.ready = self.pair = None  # guidance pauses: both ranks compute until a second call comes again
        elif len(self.calls) > 2:
            raise ParallelError(
                f"the denoiser is called {len(self.calls)} times per step; only 2 branches are known"
            )
        self.calls.clear()

    def _learn(self, first: _Call, second: _Call) -> _Pair:
        own = {}
        for name, value in second.inputs.items():
            before = first.inputs.get(name)
            if name not in first.inputs or not same(value, before):
                if isinstance(value, State) and isinstance(before, State) and value.owner is before.owner:
                    raise ParallelError(
                        f"{name}: a {type(value.owner).__name__} changes between the two guidance branches; run "
                        "this pipeline without CFG-parallel"
                    )
                own[name] = value
        return _Pair(own, None if second.context is None else second.context[0])

    def _both(self, module: nn.Module, original: Callable[..., Any], first: _Call) -> Any:
        """Answer the first call, computing the second meanwhile on the other rank."""
        assert self.pair is not None
        second = _Call({**first.inputs, **self.pair.own}, None)
        if self.rank == 0:
            mine = original(**first.arguments())
        elif self.pair.context is None or first.context is None:
            mine = original(**second.arguments())
        else:  # step caches of the two branches are kept apart by name; where the loop is they are told by keyword
            with self.contexts[module](*self.pair.context, **first.context[1]):
                mine = original(**second.arguments())
        results = self._exchange(mine)
        self.ready = (second, results[1])
        return results[0]

    def _exchange(self, mine: Any) -> tuple[Any, Any]:
        """Return the results of both ranks, of which each computed one."""
        output, rebuild = _open(mine)
        output = output.contiguous()
        both = (output, torch.empty_like(output)) if self.rank == 0 else (torch.empty_like(output), output)
        for source, tensor in enumerate(both):
            dist.broadcast(tensor, group=self.group, group_src=source)
        return rebuild(both[0]), rebuild(both[1])

    def _is_as_foreseen(self, call: _Call, foreseen: _Call) -> bool:
        if call.inputs.keys() != foreseen.inputs.keys():
            return False
        assert self.pair is not None
        for name, value in call.inputs.items():
            expected = foreseen.inputs[name]
            if value is expected:
                continue
            if name in self.pair.own:
                if not same(value, expected):
                    return False
            elif isinstance(value, Tensor) and isinstance(expected, Tensor):
                # Made anew for this call, such as timestep / 1000. Comparing on the device does not wait for it.
                if value.shape != expected.shape or value.dtype != expected.dtype:
                    return False
                self.watch.suspect((value != expected).any())
            elif not same(value, expected):
                return False
        return True

    def _split(self, original: Callable[..., Any], call: _Call) -> Any:
        """Compute one half of a batch that holds both branches."""
        mine = original(**_half(call.arguments(), _denoised(call).shape[0], self.rank))
        first, second = self._exchange(mine)
        _, rebuild = _open(mine)
        return rebuild(torch.cat([_open(first)[0], _open(second)[0]]))


def _denoised(call: _Call) -> Tensor:
    """Return the input that is denoised."""
    found = call.inputs.get("hidden_states", call.inputs.get("sample"))
    if not isinstance(found, Tensor):
        raise ParallelError(
            "the denoiser takes neither hidden_states nor sample; its branches cannot be told apart"
        )
    return found


def _half(value: Any, batch: int, rank: int) -> Any:
    if isinstance(value, Tensor):
        return value.chunk(2)[rank] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _half(entry, batch, rank) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(entry, batch, rank) for entry in value)
    return value


def _open(result: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the one tensor of a denoiser's result, and a function that puts another in its place."""
    if isinstance(result, Tensor):
        return result, lambda tensor: tensor
    if isinstance(result, tuple) and len(result) == 1:
        return result[0], lambda tensor: (tensor,)
    if hasattr(result, "sample"):
        return result.sample, lambda tensor: type(result)(sample=tensor)
    raise ParallelError(f"the denoiser returns {type(result).__name__}; only a single tensor can be exchanged")
