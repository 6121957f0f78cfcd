"""Experts one after the other: what backends without a grouped kernel have in common.

Legend: T tokens, k experts of a token, E experts, K and N features going in and coming out.

Which experts are used is known from data alone, so the loop over them is an operator of its own: torch.compile
takes it as a whole, and what is before, between and after it goes into the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize
from quantkit_runtime.kernels.dispatch import ExpertsSpec

_LIBRARY: Any = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]


class ExpertLoop(ABC):
    """What a token's experts give, summed; see :class:`quantkit_runtime.kernels.dispatch.ExpertsKernel`.

    Every sum has the order of transformers' own loop over experts, so that on the same dense weights both give the
    same bits.
    """

    extra_bytes = 0

    def __init__(self, spec: ExpertsSpec) -> None:
        self._activation = spec.activation

    @abstractmethod
    def product(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Return (T, k, N): each row of x (T, k, K) times the ``gate_up`` or ``down`` of its expert (T, k)."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts."""
        slots = top_k_index.shape[1]
        index, order = top_k_index.sort(dim=-1)
        weights = top_k_weights.gather(-1, order).unsqueeze(-1)
        rows = hidden_states.unsqueeze(1).expand(-1, slots, -1)
        gate, up = self.product("gate_up", rows, index).chunk(2, dim=-1)
        y = self.product("down", self._activation(gate) * up, index)
        y = (y * weights).to(hidden_states.dtype)
        out = torch.zeros_like(hidden_states)
        for slot in range(slots):
            out = out + y[:, slot]
        return out


def for_each_expert(
    x: Tensor, index: Tensor, num_experts: int, out_features: int, linear: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Apply ``linear(rows, expert)`` to the rows of each expert that occurs.

    Args:
        x: (T, k, K).
        index: (T, k) int64; ``num_experts`` stands for none.
        num_experts: E.
        out_features: N.
        linear: Maps (rows, K) and the number of an expert to (rows, N).

    Returns:
        (T, k, N) in the dtype of x; zeros where there is no expert.
    """
    out = x.new_zeros(*index.shape, out_features)
    for expert in torch.unique(index).tolist():
        if expert != num_experts:
            token, slot = torch.where(index == expert)
            out[token, slot] = linear(x[token, slot], expert)
    return out


def define_operator(schema: str, run: Callable[..., Tensor], allocate: Callable[..., Tensor]) -> None:
    """Make a function an operator ``torch.ops.quantkit.<name>``.

    ``torch.library.custom_op`` would import torch's compiler with the first call, which takes seconds.

    Args:
        schema: Name, arguments and result in torch's notation.
        run: The function, on every device.
        allocate: The same for torch.compile: returns an empty tensor of the right shape and dtype.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantkit::{name}", allocate, lib=_LIBRARY)


_SCHEMA = (
    "experts_dequantized(Tensor x, Tensor index, Tensor qweight, Tensor qzeros, Tensor scales, int bits, "
    "int group_size, bool sym, str packing_format) -> Tensor"
)


def experts_dequantized(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    packing_format: str,
) -> Tensor:
    """Products with the weights of experts that are unpacked in every call; see `ExpertLoop.product`."""
    scheme = Scheme(bits, group_size, sym, packing_format=packing_format)

    def linear(rows: Tensor, expert: int) -> Tensor:
        return dequantized_linear(rows, expert, qweight, qzeros, scales, scheme)

    return for_each_expert(x, index, len(scales), scales.shape[-1], linear)


def dequantized_linear(
    rows: Tensor, expert: int, qweight: Tensor, qzeros: Tensor, scales: Tensor, scheme: Scheme
) -> Tensor:
    """Product of rows (M, K) with the weight of one expert of stacks, unpacked for it."""
    stored = {"qweight": qweight[expert], "qzeros": qzeros[expert], "scales": scales[expert]}
    return functional.linear(rows, dequantize(stored, scheme, rows.dtype))


def _allocate(x: Tensor, index: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, *_: object) -> Tensor:
    del qweight, qzeros
    return x.new_empty(*index.shape, scales.shape[-1])


define_operator(_SCHEMA, experts_dequantized, _allocate)
