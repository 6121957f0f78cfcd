"""``quantkit quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import gigabytes, new_table, output
from quantkit.cli.models import resolve_model
from quantkit.cli.progress import Bar
from quantkit.recipe import find_recipe, load_recipe

if TYPE_CHECKING:
    from quantkit.quantize.plan import Plan
    from quantkit.quantize.run import Quantized

_STAGES = {
    "check": "checking the source",
    "load": "loading the model",
    "calibrate": "collecting calibration inputs",
    "tune": "tuning blocks",
    "write": "packing layers",
    "verify": "verifying layers",
    "hash": "hashing files",
}


def command(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe, by path or by name.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Path, hub id or 'demo'; instead of the recipe's model.")
    ] = None,
    output_folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-wBITSa16.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value on top of the recipe; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to tune: auto, cpu, cuda, cuda:1 ...")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, once the new one is verified.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Quantize a model as a recipe says, verify the result against the plan, and publish it."""
    given = list(overrides or ())
    if model is not None:
        # A local path is nobody else's business: the checkpoint records the folder's name.
        name = Path(model).resolve().name if Path(model).is_dir() else model
        given.append(f"model.id={json.dumps(name)}")  # in quotes: a folder may be called 1e5 or null
    loaded = load_recipe(find_recipe(recipe), given)
    source = resolve_model(model or loaded.recipe.model.id, loaded.recipe.model.revision)

    from quantkit.quantize.run import prepare, quantize

    prepared = prepare(loaded, source)
    _print_plan(prepared.plan)
    if dry_run:
        return
    target = output_folder or _default_output(loaded.recipe.model.id, loaded.recipe.scheme.bits)
    with Bar() as bar:
        result = quantize(
            prepared,
            target.absolute(),
            device=_device(device),
            overwrite=overwrite,
            on_progress=lambda step: bar(_STAGES[step.stage], step.done, step.total, step.detail),
        )
    _print_result(result, target)


def _default_output(model: str, bits: int) -> Path:
    return Path(f"{Path(model).name}-w{bits}a16")


def _device(text: str) -> str:
    if text != "auto":
        return text
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def _print_plan(plan: Plan) -> None:
    table = new_table(
        f"Plan: {plan.pipeline.folder}",
        *("component", "scheme", "layers", "16-bit Linears", "before", "after", "ratio"),
        right=("layers", "16-bit Linears", "before", "after", "ratio"),
    )
    planned = {part.component.name: part for part in plan.components}
    for name, component in plan.pipeline.components.items():
        if name not in planned:
            if component.tensors:
                size = gigabytes(component.nbytes)
                table.add_row(name, "as in the source", "", "", size, size, "1.00")
            continue
        part = planned[name]
        schemes: dict[str, int] = {}
        for layer in part.layers:
            scheme = layer.scheme
            label = f"W{scheme.bits} g{scheme.group_size} {'sym' if scheme.sym else 'asym'}"
            schemes[label] = schemes.get(label, 0) + 1
        table.add_row(
            name,
            "\n".join(schemes),
            "\n".join(map(str, schemes.values())),
            str(len(part.kept)),
            gigabytes(part.nbytes_before),
            gigabytes(part.nbytes_after),
            f"{part.nbytes_after / part.nbytes_before:.2f}",
        )
    before, after = plan.nbytes_before, plan.nbytes_after
    table.add_section()
    table.add_row("all", "", "", "", gigabytes(before), gigabytes(after), f"{after / before:.2f}")
    output.print(table)


def _print_result(result: Quantized, target: Path) -> None:
    from statistics import median

    errors = {layer.name: layer.relative_l2 for layer in result.errors}
    worst = max(errors, key=errors.__getitem__)
    output.print(
        f"{len(errors)} layers packed and verified in {result.seconds:.0f} s; relative weight error "
        f"{median(errors.values()):.4f} (median), {errors[worst]:.4f} ({worst})",
        highlight=False,
    )
    output.print(f"[bold]{target}[/]: {gigabytes(result.nbytes)}", highlight=False, soft_wrap=True)
