"""Launching Triton kernels. Triton's own way costs the host several times what a launch does.

Triton compiles a kernel for the dtypes of its arguments, for addresses and integers that are multiples of 16, and
for integers that are 1, and searches the compiled form anew in every call. For the kernels here that takes some 30
us of the host's time, longer than the device needs for a small layer. Here a form is found by what it can depend
on, and then launched itself; not on AMD's GPUs, where forms depend on the sizes of tensors, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# With its kernel, whose number is in the key: a number is given out again when its owner is gone.
_FORMS: dict[tuple[Any, ...], tuple[Any, Any]] = {}
_ALIGNMENT = 16
_KEEPS_FORMS = torch.version.hip is None


def run_kernel(
    kernel: Any, grid: tuple[int, int], tensors: Sequence[Tensor], sizes: Sequence[int], counts: Sequence[int],
    constants: Mapping[str, Any], *, warps: int, described: Sequence[Any] = (), early: bool = False,
) -> None:  # fmt: skip
    """Launch a kernel on the current device, which is that of the tensors, and its current stream.

    Args:
        kernel: Its parameters are ``described``, ``tensors``, ``sizes``, ``counts`` and ``constants``.
        grid: Programs along both axes.
        tensors: On one device.
        sizes: Integers that a layer has for life; a form is kept for every value.
        counts: Integers that change from call to call; the kernel does not specialize on them.
        constants: Names and values of the ``constexpr`` parameters.
        warps: Of a program.
        described: Descriptors of tensors, whose dtypes follow from the other arguments.
        early: Launch it while the kernel before it still works, for which it then waits itself; one of the
            constants says so, too.
    """
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    key = (
        id(kernel), warps, tensors[0].device.index, *[tensor.dtype for tensor in tensors], *sizes,
        *constants.values(),
    )  # fmt: skip
    kept = _KEEPS_FORMS and addresses % _ALIGNMENT == 0
    if kept and key in _FORMS:
        _, form = _FORMS[key]
        form[(*grid, 1)](*described, *tensors, *sizes, *counts, *constants.values())
        return
    expected = tuple(kernel.arg_names[-len(constants) :])
    if tuple(constants) != expected:
        raise TypeError(f"{kernel.__name__} takes the constants {expected}, in this order, not {tuple(constants)}")
    options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
    form = kernel[grid](*described, *tensors, *sizes, *counts, **constants, **options)
    if kept and form is not None:  # Triton's interpreter compiles nothing
        _FORMS[key] = kernel, form
