"""The backends of accelerators: Triton kernels on CUDA and XPU, chosen by the number of rows.

=============  ====================================================================================================
``triton``     few rows: one kernel that unpacks weights in registers, bound by reading a quarter of the bytes; many
               rows: unpacked to 16 bit once per call, then the vendor's product, bound by arithmetic; on Hopper a
               kernel of its own from 33 rows to thousands, and for experts of many tokens
``triton-fp8`` compute ``"fp8"``: few rows as above; many: weights and activations as e4m3, each row with its own
               scale, and the vendor's FP8 product
=============  ====================================================================================================

Where the one ends and the other begins is `quantkit_runtime.kernels.crossover`'s. Neither keeps a copy of a weight.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import unpack_zeros
from quantkit_runtime.kernels import hopper_launch, ops
from quantkit_runtime.kernels.crossover import DEFAULT_FUSED_ROWS, fused_rows
from quantkit_runtime.kernels.dispatch import ExpertsKernel, ExpertsSpec, LinearKernel, LinearSpec, register
from quantkit_runtime.kernels.tiles import unfit

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)
_CAPABILITY_FP8 = (8, 9)
_MAX_UNSORTED_SLOTS = 128
_MAX_BLOCK_ROWS = 64
_MIN_HOPPER_TOKENS = 32  # of an expert, on average
_MAX_16BIT_ROWS = 512  # with FP8 compute; above, its product makes up for the conversions even on Hopper
_MAX_E4M3 = torch.finfo(torch.float8_e4m3fn).max
_MAX_JOINED_FEATURES = 8192


class _Weight:
    """A packed weight, or a stack of them, as the operators take it."""

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> None:
        self.tiles, self.scales = tensors["qweight"], tensors["scales"]
        self.zeros: Tensor | None = None
        if not scheme.sym:
            shape = self.scales.shape
            flat = tensors["qzeros"].reshape(-1, tensors["qzeros"].shape[-1])
            self.zeros = unpack_zeros(flat, scheme).to(torch.uint8).view(shape)
        self._in_features = in_features
        self.group = 0 if scheme.group_size == -1 else scheme.group_length(in_features)
        self.extra_bytes = 0 if self.zeros is None else self.zeros.nbytes

    @property
    def fits_hopper(self) -> bool:
        """Whether `quantkit_runtime.kernels.hopper` serves it."""
        return hopper_launch.fits(self._in_features, self.tiles.shape[-2], self.group)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.tiles, self.scales, self.zeros


class TritonLinear:
    """See :class:`quantkit_runtime.kernels.dispatch.LinearKernel`."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._in_features = spec.in_features
        self._weight = _Weight(tensors, spec.scheme, spec.in_features)
        self._bias = None if bias is None else bias.to(spec.dtype)
        self._counters = ops.counters_for(spec.out_features, spec.device)
        self._fused_rows = fused_rows(spec.device)
        if hopper_launch.runs_on(spec.device) and not self._weight.fits_hopper:
            self._fused_rows = min(self._fused_rows, DEFAULT_FUSED_ROWS)
        self.extra_bytes = self._weight.extra_bytes + self._counters.nbytes
        if bias is not None and self._bias is not bias:
            self.extra_bytes += bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        bias = None if self._bias is None else self._bias.to(x.dtype)
        if x.dtype not in _DTYPES:
            return functional.linear(x, self._dense(x.dtype), bias)
        out: Tensor = _operators().linear(
            x, *self._weight.arguments, bias, self._counters, self._weight.group, self._fused_rows
        )
        return out

    def _dense(self, dtype: torch.dtype) -> Tensor:
        # float32 holds every weight exactly
        dense: Tensor = torch.ops.quantkit.unpack(
            *self._weight.arguments, self._weight.group, self._in_features, torch.float32
        )
        return dense.to(dtype)


class TritonFp8Linear(TritonLinear):
    """See :class:`quantkit_runtime.kernels.dispatch.LinearKernel`."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__(spec, tensors, bias)
        self._row_scales = _row_scales(self._weight, spec.scheme)
        self._fused_rows = min(self._fused_rows, _MAX_16BIT_ROWS)
        self.extra_bytes += self._row_scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        rows = x.numel() // self._in_features
        if x.dtype != torch.bfloat16 or rows <= self._fused_rows:
            return super().__call__(x)
        flat = x.reshape(rows, self._in_features)
        # The compiler joins plain operations with those before them, and computes once what layers share. Of wide
        # rows it makes two passes; one kernel is faster then.
        plain = torch.compiler.is_compiling() and self._in_features <= _MAX_JOINED_FEATURES
        values, scales = _quantize_rows(flat) if plain else _operators().quantize_rows(flat)
        out: Tensor = _operators().linear_fp8(
            values, scales, *self._weight.arguments, self._row_scales, self._bias, self._weight.group
        )
        return out.view(*x.shape[:-1], out.shape[-1])


def _operators() -> Any:
    """Return what holds the functions to call: torch's operators under the compiler, else those behind them."""
    return torch.ops.quantkit if torch.compiler.is_compiling() else ops


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Do what the operator ``quantize_rows`` does, in operations that the compiler sees."""
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (wide * (_MAX_E4M3 / peak)).to(torch.float8_e4m3fn), peak / _MAX_E4M3


def _row_scales(weight: _Weight, scheme: Scheme) -> Tensor:
    """Return what to divide each row of a weight by so that it fits into e4m3: (N,) float32."""
    if weight.zeros is None:
        reach: Tensor | int = scheme.midpoint
    else:
        zeros = weight.zeros.float()
        reach = torch.maximum(zeros, scheme.max_code - zeros)
    largest = (weight.scales.float().abs() * reach).amax(0)
    return (largest / _MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny)


class TritonExperts:
    """See :class:`quantkit_runtime.kernels.dispatch.ExpertsKernel`."""

    def __init__(self, spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> None:
        self._experts = spec.num_experts
        self._gate_up = _Weight(gate_up, spec.scheme, spec.hidden_size)
        self._down = _Weight(down, spec.scheme, spec.intermediate_size)
        # None where the kernel itself can apply it.
        self._activation: Callable[[Tensor], Tensor] | None = None if _is_silu(spec.activation) else spec.activation
        self._sorts = hopper_launch.runs_on(spec.device) and self._gate_up.fits_hopper and self._down.fits_hopper
        self.extra_bytes = self._gate_up.extra_bytes + self._down.extra_bytes

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts."""
        dtype = hidden_states.dtype
        x = hidden_states if dtype in _DTYPES else hidden_states.to(torch.bfloat16)
        tokens, top_k = top_k_index.shape
        if tokens == 0:
            return torch.zeros_like(hidden_states)
        if self._sorts and tokens * top_k >= _MIN_HOPPER_TOKENS * self._experts:
            return self._call_sorted(x, top_k_index, top_k_weights).to(dtype)
        order, expert, start, block_rows = route(top_k_index, self._experts)
        multiply = partial(_operators().multiply_experts, block_rows=block_rows)
        places = (order, expert, start)
        if self._activation is None:
            inner = multiply(
                x, *self._gate_up.arguments, self._gate_up.group, top_k, *places, weights=None, gated=True
            )
        else:
            spread = x.repeat_interleave(top_k, 0)
            both = multiply(
                spread, *self._gate_up.arguments, self._gate_up.group, 1, *places, weights=None, gated=False
            )
            gate, up = both.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        out = multiply(
            inner, *self._down.arguments, self._down.group, 1, *places,
            weights=top_k_weights.reshape(-1).contiguous(), gated=False,
        )  # fmt: skip
        summed: Tensor = out.view(tokens, top_k, -1).sum(1)
        return summed.to(dtype)

    def _call_sorted(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Apply the experts to many tokens, brought into the experts' order first."""
        tokens, top_k = index.shape
        block_rows = hopper_launch.block_rows(tokens * top_k / self._experts)
        order, expert, start = sort_slots(index.reshape(-1), self._experts, block_rows)
        multiply = partial(_operators().multiply_sorted, expert=expert, start=start, block_rows=block_rows)
        both = multiply(x[order // top_k], *self._gate_up.arguments, self._gate_up.group)
        gate, up = both.chunk(2, dim=-1)
        activation = functional.silu if self._activation is None else self._activation
        out = multiply(activation(gate) * up, *self._down.arguments, self._down.group)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        summed: Tensor = (out[back].view(tokens, top_k, -1) * weights.to(x.dtype)[..., None]).sum(1)
        return summed


def route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sort slots by expert and cut each expert's into blocks, without waiting for the device.

    Few slots are not sorted: each is a block of its own.

    Args:
        index: (tokens, k) int64, the experts of each token; E means none.
        experts: E.

    Returns:
        order, expert, start and the rows of a block, as `quantkit_runtime.kernels.launch.multiply_experts` takes
        them.
    """
    flat = index.reshape(-1)
    slots = flat.numel()
    if slots <= _MAX_UNSORTED_SLOTS:
        nothing = torch.empty(0, dtype=torch.int32, device=index.device)
        return nothing, flat.to(torch.int32), nothing, 8
    block_rows = 8
    while block_rows < min(slots // experts, _MAX_BLOCK_ROWS):
        block_rows *= 2
    order, expert, start = sort_slots(flat, experts, block_rows)
    return order.to(torch.int32), expert, start, block_rows


def sort_slots(flat: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots by expert and cut each expert's into blocks.

    Args:
        flat: (slots,) int64, whose each is; E means nobody's.
        experts: E.
        block_rows: Slots of a block at most.

    Returns:
        order (slots,) int64; expert (blocks,) and start (blocks + E,) int32, as in
        `quantkit_runtime.kernels.launch.multiply_experts`.
    """
    ranked, order = flat.sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(experts, device=flat.device), right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    blocks = (ends - begins + block_rows - 1) // block_rows
    through = blocks.cumsum(0)
    block = torch.arange(flat.numel() // block_rows + experts, device=flat.device)
    expert = torch.searchsorted(through, block, right=True)
    owner = expert.clamp(max=experts - 1)
    start = begins[owner] + (block - (through - blocks)[owner]) * block_rows
    return order, expert.to(torch.int32), torch.cat([start, ends]).to(torch.int32)


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    return activation is functional.silu or isinstance(activation, nn.SiLU)


def _requirement(spec: LinearSpec | ExpertsSpec) -> str | None:
    if spec.compute != "16bit":
        return f"it computes in 16 bit, not in {spec.compute}"
    return _refusal(spec)


def _requirement_fp8(spec: LinearSpec) -> str | None:
    if spec.compute != "fp8":
        return f"it computes in fp8, not in {spec.compute}"
    if spec.dtype != torch.bfloat16:
        return f"it needs bf16 activations, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, the weights are on {spec.device}"
    if spec.in_features % 16 or spec.out_features % 16:
        return "torch's FP8 product needs input and output features that are multiples of 16"
    return _too_old(spec.device, _CAPABILITY_FP8) or _refusal(spec)


def _refusal(spec: LinearSpec | ExpertsSpec) -> str | None:
    """Return why the Triton kernels cannot serve a layer here, or None."""
    device = spec.device
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and _interpreted()):
        return f"it needs the weights on a CUDA or XPU device, they are on {device}"
    if not _has_triton():
        return "it needs triton, which is not installed: pip install triton"
    if device.type == "cuda" and torch.version.cuda is not None:
        too_old = _too_old(device, _CAPABILITY)
        if too_old is not None:
            return too_old
    if isinstance(spec, LinearSpec):
        return unfit(spec.scheme, spec.in_features)
    return unfit(spec.scheme, spec.hidden_size) or unfit(spec.scheme, spec.intermediate_size)


def _too_old(device: torch.device, wanted: tuple[int, int]) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found >= wanted:
        return None
    return f"it needs compute capability {wanted[0]}.{wanted[1]} or newer, this GPU has {found[0]}.{found[1]}"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@register("linear", "triton", priority=20, requirement=_requirement, layout="tiles")
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel from the repacked weight."""
    return TritonLinear(spec, tensors, bias)


@register("linear", "triton-fp8", priority=20, requirement=_requirement_fp8, layout="tiles")
def prepare_fp8(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel from the repacked weight."""
    return TritonFp8Linear(spec, tensors, bias)


@register("experts", "triton", priority=20, requirement=_requirement, layout="tiles")
def prepare_experts(spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> ExpertsKernel:
    """Make the kernel from the repacked weights."""
    return TritonExperts(spec, gate_up, down)
