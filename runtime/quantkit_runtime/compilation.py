"""Compiling the repeated blocks of a model, and saying what a cold start spends its time with.

Blocks of one class share what is compiled, so it takes as long as a block or two, not as long as the model. Each is
compiled as a whole (``fullgraph=True``): what cannot be captured is an error, never a silent return to slow code.
"""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from quantkit_runtime.errors import QuantkitRuntimeError

_log = logging.getLogger("quantkit_runtime")
# transformers declares no repeated blocks, but calls the layers of all its language models so.
_DECODER_LAYER = r"\w*DecoderLayer"
_GRAPHS_OF_A_LAYER = 16  # prefill and decode, with and without a mask or a cache, in several dtypes


def compile_pipeline(pipeline: Any, **options: Any) -> None:
    """Compile the repeated blocks of a diffusers pipeline's denoisers; text encoders and VAE stay as they are.

    Nothing is compiled before the first call.

    Args:
        pipeline: A ``diffusers.DiffusionPipeline``.
        **options: For ``torch.compile``.

    Raises:
        QuantkitRuntimeError: No component has repeated blocks.
    """
    for name, denoiser in denoisers_of(pipeline, "compile").items():
        _compile_blocks(denoiser, name, options)


def denoisers_of(pipeline: Any, option: str) -> dict[str, nn.Module]:
    """Return the components of a diffusers pipeline that are called in every step, by name.

    Raises:
        QuantkitRuntimeError: There is none that ``option``, of `load_pipeline`, could go to.
    """
    denoisers = {
        name: component
        for name, component in pipeline.components.items()
        # Some autoencoders have such blocks, too.
        if getattr(component, "_repeated_blocks", None) and not hasattr(component, "decode")
    }
    if not denoisers:
        raise QuantkitRuntimeError(
            f"{option}: {type(pipeline).__name__} has no component whose class names its repeated blocks; load it "
            f"without {option}"
        )
    return denoisers


def compile_model(model: nn.Module, **options: Any) -> None:
    """Compile the repeated blocks of one model: those its class names, else the decoder layers.

    Args:
        model: What `load_model` returns.
        **options: For ``torch.compile``.

    Raises:
        QuantkitRuntimeError: It has none.
    """
    _compile_blocks(model, type(model).__name__, options)


def _compile_blocks(model: nn.Module, name: str, options: dict[str, Any]) -> None:
    classes = getattr(model, "_repeated_blocks", None)
    wanted = re.compile("|".join(map(re.escape, classes)) if classes else _DECODER_LAYER)
    blocks = {path: module for path, module in model.named_modules() if wanted.fullmatch(type(module).__name__)}
    if not blocks:
        raise QuantkitRuntimeError(
            f"compile: {name}: has no blocks of class {wanted.pattern}; load it without compile"
        )
    if any(re.fullmatch(_DECODER_LAYER, type(block).__name__) for block in blocks.values()):
        options = _for_decoder_layers(len(blocks)) | options
    for block in blocks.values():
        block.compile(fullgraph=True, **options)
    counts = Counter(type(block).__name__ for block in blocks.values())
    told = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    _log.info("%s: %s to be compiled with the first call", name, told)
    for owner in {path.rpartition(".")[0].rpartition(".")[0] for path in blocks}:
        _Watch(f"{name}.{owner}" if owner else name).follow(model.get_submodule(owner))


def _for_decoder_layers(count: int) -> dict[str, Any]:
    """Return options for layers that write to a cache, which grows, under their own number.

    So the layers share nothing that is compiled, and dynamo's limits, which are for functions that are compiled
    again and again by mistake, would be met soon.
    """
    import torch._dynamo.config as limits

    options: dict[str, Any] = {"dynamic": True}
    if _can_isolate():
        options["isolate_recompiles"] = True
    else:
        limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_OF_A_LAYER * count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _GRAPHS_OF_A_LAYER * count)
    return options


def _can_isolate() -> bool:
    """Whether this torch keeps what was compiled for one module apart from that of others; 2.14 does."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


class _Watch:
    """Logs when a module's call compiles something, and how long that took."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_first = True
        self._graphs = 0
        self._began = 0.0

    def follow(self, module: nn.Module) -> None:
        """Watch every call of a module that is not compiled itself."""
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, *_: object) -> None:
        if self._is_first:
            self._is_first = False
            _log.info(
                "%s: compiling its blocks; later calls with the same shapes will not wait for this", self._name
            )
        self._graphs, self._began = _compiled_graphs(), time.monotonic()

    def _after(self, *_: object) -> None:
        made = _compiled_graphs() - self._graphs
        if made:
            seconds = time.monotonic() - self._began
            _log.info("%s: %d graph%s compiled, %.1f s", self._name, made, "s" * (made > 1), seconds)


def _compiled_graphs() -> int:
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
