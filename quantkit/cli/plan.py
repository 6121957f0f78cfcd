"""The table of a plan: what becomes of every component."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from quantkit.cli.console import gigabytes, new_table, output

if TYPE_CHECKING:
    from quantkit.quantize.plan import ComponentPlan, Plan


def print_plan(plan: Plan, title: str) -> None:
    """Print layers, parameters and bytes of every component with weights, before and after.

    Args:
        plan: To print.
        title: Stands above the table.
    """
    numbers = ("layers", "params", "before", "after", "ratio")
    table = new_table("", "component", "scheme", *numbers, right=numbers)
    planned = {part.component.name: part for part in plan.components}
    parameters = 0
    for name, component in plan.source.components.items():
        if not component.tensors:
            continue
        parameters += component.parameters
        count = _billions(component.parameters)
        if name in planned:
            part = planned[name]
            schemes = _schemes(part)
            layers = "\n".join(map(str, schemes.values()))
            table.add_row(name, "\n".join(schemes), layers, count, *_sizes(part.nbytes_before, part.nbytes_after))
        else:
            dtypes = Counter(info.dtype for info in component.tensors.values())
            table.add_row(name, "\n".join(dtypes), "", count, *_sizes(component.nbytes, component.nbytes))
    table.add_section()
    table.add_row("all", "", "", _billions(parameters), *_sizes(plan.nbytes_before, plan.nbytes_after))
    output.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    output.print(table)


def _schemes(part: ComponentPlan) -> dict[str, int]:
    """Return the number of Linears by scheme, and by dtype those that stay as they are."""
    packed = Counter(
        f"W{layer.scheme.bits} g{layer.scheme.group_size} {'sym' if layer.scheme.sym else 'asym'}"
        for layer in part.layers
    )
    kept = Counter(part.component.tensors[f"{name}.weight"].dtype for name, _ in part.kept)
    return dict(packed) | dict(kept)


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return gigabytes(before), gigabytes(after), f"{after / before:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
