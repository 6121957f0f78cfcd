"""The Triton kernels as operators of torch, so that `torch.compile` and CUDA graphs take them as they are.

Importing this module defines the operators; triton is imported when one of them first runs.

=======================  ==========================================================================================
``linear``               x @ W.T + bias, in one kernel for few rows, else through a dense copy of the weight
``unpack``               the dense weight
``quantize_rows``        activations as e4m3, each row with its own scale
``linear_fp8``           the product of such activations with the weight, rounded to e4m3 for the call
``multiply_experts``     products of tokens with the weights of the experts that each is sent to
``multiply_sorted``      the same for many tokens that are sorted by expert, on Hopper
=======================  ==========================================================================================

Outside the compiler the functions of this module do the same as the operators, without the dispatcher, which costs
as much of the CPU's time as a launch.

The dense copy lives for the time of a call. It comes from the caching allocator, which hands the same memory to the
next layer: the largest layer decides how much that is, and it counts in peak memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.kernels.tiles import PART

_LIBRARY: Any = torch.library.Library("quantkit", "DEF")  # type: ignore[no-untyped-call]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_WEIGHT = "Tensor tiles, Tensor scales, Tensor? zeros"


def _define(schema: str) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor counters, int group, int fused_rows) -> Tensor")
_define(f"unpack({_WEIGHT}, int group, int in_features, ScalarType dtype) -> Tensor")
_define("quantize_rows(Tensor x) -> (Tensor, Tensor)")
_define(f"linear_fp8(Tensor x, Tensor x_scales, {_WEIGHT}, Tensor row_scales, Tensor? bias, int group) -> Tensor")
_define(
    f"multiply_experts(Tensor x, {_WEIGHT}, int group, int top_k, Tensor order, Tensor expert, Tensor start, "
    "Tensor? weights, int block_rows, bool gated) -> Tensor"
)
_define(f"multiply_sorted(Tensor x, {_WEIGHT}, int group, Tensor expert, Tensor start, int block_rows) -> Tensor")


def _on_device_of_first(function: _Function) -> _Function:
    """Let a function run on the accelerator of its first argument: Triton launches on the current one."""

    @wraps(function)
    def run(first: Tensor, *rest: Any, **named: Any) -> Any:
        index = first.device.index
        if index is None or index == torch.accelerator.current_device_index():
            return function(first, *rest, **named)
        with torch.accelerator.device_index(index):
            return function(first, *rest, **named)

    return cast("_Function", run)


@_on_device_of_first
def linear(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, counters: Tensor,
    group: int, fused_rows: int,
) -> Tensor:  # fmt: skip
    """See the operator ``linear``; arguments as `quantkit_runtime.kernels.launch.multiply` takes them.

    Up to ``fused_rows`` rows one kernel does all; with more the weight is unpacked first.
    """
    from quantkit_runtime.kernels import launch

    in_features, out_features = x.shape[-1], tiles.shape[1]
    flat = x.reshape(-1, in_features).contiguous()
    rows = flat.shape[0]
    if rows == 0:
        out = flat.new_empty(0, out_features)
    elif rows <= fused_rows:
        out = launch.multiply(flat, tiles, scales, zeros, bias, counters, group)
    else:
        out = functional.linear(flat, launch.unpack(tiles, scales, zeros, group, in_features, x.dtype), bias)
    return out.view(*x.shape[:-1], out_features)


@_on_device_of_first
def linear_fp8(
    x: Tensor, x_scales: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, row_scales: Tensor,
    bias: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    """See the operator ``linear_fp8``: x (M, K) e4m3 and its scales (M, 1); the result is bf16."""
    from quantkit_runtime.kernels import launch

    weight = launch.unpack(tiles, scales, zeros, group, x.shape[1], torch.float8_e4m3fn, row_scales)
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scales, scale_b=row_scales.view(1, -1), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


@_on_device_of_first
def unpack(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """See the operator ``unpack``."""
    from quantkit_runtime.kernels import launch

    return launch.unpack(tiles, scales, zeros, group, in_features, dtype)


@_on_device_of_first
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See the operator ``quantize_rows``."""
    from quantkit_runtime.kernels import launch

    return launch.quantize_rows(x.contiguous())


@_on_device_of_first
def multiply_experts(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, top_k: int, order: Tensor,
    expert: Tensor, start: Tensor, weights: Tensor | None, block_rows: int, gated: bool,
) -> Tensor:  # fmt: skip
    """See the operator ``multiply_experts``."""
    from quantkit_runtime.kernels import launch

    return launch.multiply_experts(
        x.contiguous(), tiles, scales, zeros, group, top_k, order, expert, start, weights, block_rows, gated=gated
    )


@_on_device_of_first
def multiply_sorted(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, expert: Tensor, start: Tensor,
    block_rows: int,
) -> Tensor:  # fmt: skip
    """See the operator ``multiply_sorted``."""
    from quantkit_runtime.kernels import hopper_launch

    return hopper_launch.multiply_sorted(x.contiguous(), tiles, scales, zeros, group, expert, start, block_rows)


OPERATORS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "unpack": unpack,
    "quantize_rows": quantize_rows,
    "linear_fp8": linear_fp8,
    "multiply_experts": multiply_experts,
    "multiply_sorted": multiply_sorted,
}
for _name, _function in OPERATORS.items():
    # One implementation for every device: Triton compiles for the current one.
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an operator returns on fake tensors: shapes and dtypes."""
    decorate: Any = torch.library.register_fake(f"quantkit::{name}", lib=_LIBRARY)
    return decorate  # type: ignore[no-any-return]


@_fake("linear")
def _(x: Tensor, tiles: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], tiles.shape[1])


@_fake("unpack")
def _(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    del scales, zeros, group
    return tiles.new_empty(tiles.shape[1], in_features, dtype=dtype)


@_fake("quantize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@_fake("linear_fp8")
def _(x: Tensor, x_scales: Tensor, tiles: Tensor, *_: object) -> Tensor:
    del x_scales
    return x.new_empty(x.shape[0], tiles.shape[1], dtype=torch.bfloat16)


@_fake("multiply_experts")
def _(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, top_k: int, *rest: object
) -> Tensor:
    del scales, zeros, group
    gated = rest[-1]
    return x.new_empty(x.shape[0] * (top_k if gated else 1), tiles.shape[2] // (2 if gated else 1))


@_fake("multiply_sorted")
def _(x: Tensor, tiles: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], tiles.shape[2])


def counters_for(out_features: int, device: torch.device) -> Tensor:
    """Return the counters that `linear` wants for a layer: int32, all 0.

    They are the layer's own: two calls of one layer must not run at the same time on two streams. There are enough
    for four parts of the result for each part of the output features, and for all programs of
    `quantkit_runtime.kernels.hopper`.
    """
    enough = max(4 * -(-out_features // PART), 2 * multiprocessors(device))
    return torch.zeros(enough, dtype=torch.int32, device=device)
