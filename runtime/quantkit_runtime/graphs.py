"""Recording a denoiser's call as a CUDA graph: the host then starts one thing for each step instead of thousands.

It pays where the device waits for the host: small pictures, fast cards, packed layers. Nothing else changes: a
pipeline stays what it was, and the kernels that run are the same, with the same results.

The first call with inputs of some sizes runs as ever, and warms up whatever compiles or allocates; the second is
recorded; from then on the recording is replayed. A recording holds the addresses of all that it reads: inputs are
copied to where it expects them, and what it returns is copied out. It goes when the model moves. What cannot be
recorded is an error, never a silent return to slow code.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from quantkit_runtime.compilation import denoisers_of
from quantkit_runtime.errors import QuantkitRuntimeError

_log = logging.getLogger("quantkit_runtime")
_MAX_RECORDINGS = 8
"""Of one denoiser: sizes, batches and arguments that differ; the one that was not used for longest makes room."""
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Graph(Protocol):
    """Work that is recorded once and replayed."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Record some work and return its results, which hold values once it has been replayed."""

    def replay(self) -> None:
        """Do the work again, with the same addresses."""


class CudaGraph:
    """See `Graph`.

    Args:
        device: Where the work runs.
        pool: Memory that several graphs share, as ``torch.cuda.graph_pool_handle`` returns it; no two of them are
            replayed at the same time.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        """Record what some work launches."""
        # When it fails, torch leaves its own stream as the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                # Other threads of a process, that of a server say, may use the device meanwhile.
                with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                    return work()
            except RuntimeError:
                self._end_failed()
                raise

    def _end_failed(self) -> None:
        """End what torch leaves open if it cannot record: its allocator and random generator go on with it."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # the generator stops at the end of the next recording
            torch.zeros(1, device=self._device)

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def record_pipeline(pipeline: Any) -> None:
    """Let the denoisers of a diffusers pipeline run as CUDA graphs from their second call on.

    Args:
        pipeline: A ``diffusers.DiffusionPipeline`` on a CUDA device.

    Raises:
        QuantkitRuntimeError: It has no denoiser.
    """
    denoisers = denoisers_of(pipeline, "cuda_graphs")
    pool = torch.cuda.graph_pool_handle()  # for all: they run one after the other
    for name, denoiser in denoisers.items():
        record_calls(denoiser, name, partial(CudaGraph, next(denoiser.parameters()).device, pool))


def record_calls(denoiser: nn.Module, name: str, make_graph: Callable[[], Graph]) -> None:
    """Put recordings in the place of a denoiser's ``forward``.

    Args:
        denoiser: A model whose calls launch the same work whenever sizes and constants are the same.
        name: For messages.
        make_graph: Makes a graph to record into.
    """
    recordings = _Recordings(denoiser, name, make_graph)
    original: Callable[..., Any] = denoiser.forward
    move: Callable[..., Any] = denoiser._apply

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return recordings.call(original, (args, kwargs))

    @wraps(move)
    def _apply(*args: Any, **kwargs: Any) -> Any:
        recordings.forget()
        return move(*args, **kwargs)

    # Of this one object; torch calls both by these names.
    vars(denoiser).update(forward=forward, _apply=_apply)


class _Recording:
    """One recorded call."""

    def __init__(self, graph: Graph, function: Callable[..., Any], leaves: list[Any], form: TreeSpec) -> None:
        self._graph = graph
        self._inputs = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
        places = iter(self._inputs)
        args, kwargs = tree_unflatten([next(places) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
        self._outputs = graph.record(lambda: function(*args, **kwargs))

    def replay(self, leaves: list[Any]) -> Any:
        torch._foreach_copy_(self._inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        self._graph.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._outputs)


class _Recordings:
    """The recorded calls of one denoiser, by all that a recording depends on."""

    def __init__(self, denoiser: nn.Module, name: str, make_graph: Callable[[], Graph]) -> None:
        self._denoiser, self._name, self._make_graph = denoiser, name, make_graph
        self._kept: OrderedDict[Any, _Recording | None] = OrderedDict()  # None: called once

    def forget(self) -> None:
        self._kept.clear()

    def call(self, function: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        leaves, form = tree_flatten(arguments)
        self._check(leaves)
        described = tuple(
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
        )
        key = (form, described, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"))
        if key not in self._kept:
            self._kept[key] = None
            if len(self._kept) > _MAX_RECORDINGS:
                self._kept.popitem(last=False)
            args, kwargs = arguments
            return function(*args, **kwargs)
        self._kept.move_to_end(key)
        recording = self._kept[key]
        if recording is None:
            _log.info("%s: recording its step as a CUDA graph", self._name)
            try:
                recording = _Recording(self._make_graph(), function, leaves, form)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise QuantkitRuntimeError(
                    f"cuda_graphs: {self._name}: cannot be recorded: {reason}; load it without cuda_graphs"
                ) from error
            self._kept[key] = recording
        return recording.replay(leaves)

    def _check(self, leaves: list[Any]) -> None:
        """Refuse what a recording would not see or not do."""
        why = _state_of(self._denoiser)
        if torch.is_grad_enabled():
            why = "gradients are on; call it under torch.no_grad()"
        device = next(self._denoiser.parameters()).device
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != device:
                    why = f"an input is on {leaf.device}, the model on {device}"
            elif not isinstance(leaf, _CONSTANTS):
                why = f"an argument is a {type(leaf).__name__}, which may change without being seen"
        if why is not None:
            raise QuantkitRuntimeError(f"cuda_graphs: {self._name}: {why}; load it without cuda_graphs")


def _state_of(denoiser: Any) -> str | None:
    """Return what a denoiser has that changes from call to call or after loading, or None."""
    if getattr(denoiser, "is_cache_enabled", False):
        return "it has a step cache"
    if getattr(denoiser, "_hf_peft_config_loaded", False):
        return "it has adapters, which can be changed"
    if getattr(denoiser, "_hf_hook", None) is not None:
        return "its weights are moved while it runs"
    if getattr(denoiser, "_parallel_config", None) is not None:
        return "it runs on several ranks"
    return None
