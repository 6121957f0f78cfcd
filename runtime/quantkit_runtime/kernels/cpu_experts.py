"""The CPU backend of experts: torch's int4 product for experts with few tokens.

Dense copies of all experts would be as large as the unquantized model, so there are none; what it keeps are the
same 4 bits in the operator's layout (0.53 bytes per weight in groups of 128). An expert with more than
:data:`MAX_INT4_ROWS` tokens is unpacked from the stored tensors, for that call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.kernels.cpu_int4 import Int4Weight, int4_product, why_no_int4
from quantkit_runtime.kernels.dispatch import ExpertsKernel, ExpertsSpec, register
from quantkit_runtime.kernels.experts_loop import ExpertLoop, define_operator, dequantized_linear, for_each_expert

MAX_INT4_ROWS = 64
"""Tokens of an expert above which unpacking its weight and a dense product are faster."""


class CpuExperts(ExpertLoop):
    """Expert after expert, see :class:`quantkit_runtime.kernels.dispatch.ExpertsKernel`."""

    def __init__(self, spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> None:
        super().__init__(spec)
        self._scheme = spec.scheme
        self._stored = {"gate_up": dict(gate_up), "down": dict(down)}
        self._int4 = {name: _repack(stacks, spec.scheme) for name, stacks in self._stored.items()}
        self.extra_bytes = sum(weight.nbytes for weight in self._int4.values())

    def product(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Product of each row with the weight of its expert."""
        stored, int4, scheme = self._stored[name], self._int4[name], self._scheme
        out: Tensor = torch.ops.quantkit.experts_int4_cpu(
            x,
            index,
            int4.codes,
            int4.scales,
            int4.group_length,
            stored["qweight"],
            stored["qzeros"],
            stored["scales"],
            scheme.group_size,
            scheme.sym,
            scheme.packing_format,
        )
        return out


def _repack(stacks: Mapping[str, Tensor], scheme: Scheme) -> Int4Weight:
    count = len(stacks["scales"])
    experts = ({name: stack[expert] for name, stack in stacks.items()} for expert in range(count))
    return Int4Weight.stack([Int4Weight.from_packed(tensors, scheme) for tensors in experts])


_SCHEMA = (
    "experts_int4_cpu(Tensor x, Tensor index, Tensor codes, Tensor pairs, int group_length, Tensor qweight, "
    "Tensor qzeros, Tensor scales, int group_size, bool sym, str packing_format) -> Tensor"
)


def experts_int4(
    x: Tensor,
    index: Tensor,
    codes: Tensor,
    pairs: Tensor,
    group_length: int,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    group_size: int,
    sym: bool,
    packing_format: str,
) -> Tensor:
    """Products with 4-bit experts, held as in `Int4Weight` and as stored; see `ExpertLoop.product`."""
    scheme = Scheme(4, group_size, sym, packing_format=packing_format)

    def linear(rows: Tensor, expert: int) -> Tensor:
        if rows.dtype == torch.bfloat16 and len(rows) <= MAX_INT4_ROWS:
            return int4_product(rows, codes[expert], pairs[expert], group_length)
        return dequantized_linear(rows, expert, qweight, qzeros, scales, scheme)

    return for_each_expert(x, index, len(scales), scales.shape[-1], linear)


def _allocate(x: Tensor, index: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*index.shape, codes.shape[1])


define_operator(_SCHEMA, experts_int4, _allocate)


def _requirement(spec: ExpertsSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"it needs the weights on the CPU, they are on {spec.device}"
    if spec.compute != "16bit":
        return f"it computes in 16 bit, not in {spec.compute}"
    shapes = ((spec.hidden_size, 2 * spec.intermediate_size), (spec.intermediate_size, spec.hidden_size))
    reasons = (why_no_int4(*shape, spec.scheme, spec.dtype) for shape in shapes)
    return next((reason for reason in reasons if reason is not None), None)


@register("experts", "cpu", priority=10, requirement=_requirement)
def prepare(spec: ExpertsSpec, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> ExpertsKernel:
    """Make the kernel; repacks every expert."""
    return CpuExperts(spec, gate_up, down)
