"""Launching kernels: a compiled form is looked for once, and taken only for what it was compiled for."""

import pytest
import torch

from quantkit_runtime.kernels.start import run_kernel


class Form:
    """What Triton returns of a launch: indexed by a grid, it launches with all arguments in their order."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """Stands for a function that Triton compiles."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "N", "M", "BLOCK", "EVEN")

    def __init__(self):
        self.forms = []

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            del arguments, num_warps, constants
            self.forms.append(Form())
            return self.forms[-1]

        return launch


def start(kernel, x, *, size=32, rows=5, block=8, warps=4):
    run_kernel(kernel, (3, 2), (x,), (size,), (rows,), {"BLOCK": block, "EVEN": True}, warps=warps)


def test_the_second_call_launches_the_form_of_the_first_whatever_its_counts():
    kernel, x = Kernel(), torch.zeros(64)
    start(kernel, x)
    start(kernel, x, rows=6)
    (form,) = kernel.forms
    ((grid, (pointer, *rest)),) = form.launched
    assert grid == (3, 2, 1)
    assert pointer is x
    assert rest == [32, 6, 8, True]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": torch.zeros(64)[1:]},
        {"size": 33},
        {"block": 16},
        {"warps": 8},
    ],
    ids=["dtype", "alignment", "size", "constant", "warps"],
)
def test_what_a_form_is_compiled_for_tells_it_from_others(other):
    kernel, x = Kernel(), torch.zeros(64)
    start(kernel, x)
    start(kernel, **({"x": x} | other))
    assert len(kernel.forms) == 2
    assert not kernel.forms[0].launched


def test_constants_in_another_order_than_the_kernels_are_refused():
    with pytest.raises(TypeError, match="'BLOCK', 'EVEN'"):
        run_kernel(Kernel(), (1, 1), (torch.zeros(64),), (32,), (5,), {"EVEN": True, "BLOCK": 8}, warps=4)
