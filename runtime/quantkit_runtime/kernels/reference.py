"""The reference backend: unpack the weight in every call, then the ordinary dense product.

It holds nothing beside the stored tensors, runs on any device that torch supports, and its results are bit for
bit those of a ``torch.nn.Linear`` that holds the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize
from quantkit_runtime.kernels.dispatch import ExpertsKernel, ExpertsSpec, LinearKernel, LinearSpec, register


class ReferenceKernel:
    """``x @ dequantize(weight).T + bias``, see :class:`quantkit_runtime.kernels.dispatch.LinearKernel`."""

    extra_bytes = 0

    def __init__(self, scheme: Scheme, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._scheme = scheme
        self._tensors = dict(tensors)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = dequantize(self._tensors, self._scheme, x.dtype)
        return functional.linear(x, weight, None if self._bias is None else self._bias.to(x.dtype))


class ReferenceExperts:
    """Expert after expert, see :class:`quantkit_runtime.kernels.dispatch.ExpertsKernel`.

    Unpacks the weights of the experts that some token is sent to, in every call. The order of operations is that of
    transformers' own loop over experts, so that on dequantized weights both give the same bits.
    """

    extra_bytes = 0

    def __init__(self, spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> None:
        self._spec = spec
        self._gate_up = dict(gate_up)
        self._down = dict(down)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts."""
        spec, dtype = self._spec, hidden_states.dtype
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert == spec.num_experts:  # a slot that is sent nowhere
                continue
            token, slot = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate, up = functional.linear(x, self._weight(self._gate_up, expert, dtype)).chunk(2, dim=-1)
            y = functional.linear(spec.activation(gate) * up, self._weight(self._down, expert, dtype))
            y = y * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(dtype))
        return out

    def _weight(self, stacks: Mapping[str, Tensor], expert: int, dtype: torch.dtype) -> Tensor:
        return dequantize({name: stack[expert] for name, stack in stacks.items()}, self._spec.scheme, dtype)


def _requirement(spec: LinearSpec | ExpertsSpec) -> str | None:
    return None if spec.compute == "16bit" else f"it computes in 16 bit, not in {spec.compute}"


@register("linear", "reference", priority=0, requirement=_requirement)
def prepare(spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearKernel:
    """Make the kernel; copies nothing."""
    return ReferenceKernel(spec.scheme, tensors, bias)


@register("experts", "reference", priority=0, requirement=_requirement)
def prepare_experts(spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> ExpertsKernel:
    """Make the kernel; copies nothing."""
    return ReferenceExperts(spec, gate_up, down)
