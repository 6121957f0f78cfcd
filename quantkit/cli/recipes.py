"""``quantkit recipes``."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import errors, gigabytes, new_table, output
from quantkit.errors import OutputError, RecipeError

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")

_Name = Annotated[str, typer.Argument(help="Recipe, by path or by name.")]


@app.command("ls")
def list_all() -> None:
    """List the recipes that are found by name, with the sizes that their plans predict."""
    from quantkit.families.published import recall_sizes
    from quantkit.recipe import list_recipes, load_recipe

    sizes = ("before", "after")
    table = new_table("", "name", "model", "task", "scheme", "iters", *sizes, right=("iters", *sizes))
    for name, path in list_recipes().items():
        try:
            recipe = load_recipe(path).recipe
        except RecipeError:
            table.add_row(name, f"not valid: quantkit recipes validate {path}")
            continue
        scheme = recipe.scheme
        known = recall_sizes(recipe)
        table.add_row(
            name,
            recipe.model.id,
            recipe.model.task,
            f"W{scheme.bits} g{scheme.group_size}",
            str(scheme.iters) if scheme.tuned else "RTN",
            *((gigabytes(known.before), gigabytes(known.after)) if known else ("?", "?")),
        )
    output.print(table)


@app.command("show")
def show(name: _Name) -> None:
    """Print a recipe."""
    from rich.syntax import Syntax

    from quantkit.recipe import find_recipe

    path = find_recipe(name)
    errors.print(str(path), style="dim", markup=False, highlight=False, soft_wrap=True)  # a file gets YAML alone
    text = path.read_text(encoding="utf-8")
    output.print(Syntax("", "yaml", background_color="default").highlight(text), end="", soft_wrap=True)


@app.command("cp")
def copy(
    name: _Name,
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
) -> None:
    """Copy a recipe, to change it."""
    from quantkit.recipe import find_recipe

    source = find_recipe(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise OutputError(f"{target}: exists; give another name")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink()  # what a full disk has left of it
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    output.print(str(target), highlight=False, soft_wrap=True)


@app.command("validate")
def validate(name: _Name) -> None:
    """Check a recipe, the metrics that it bounds, and the prompt files that it names."""
    from quantkit.compare.kinds import check_thresholds
    from quantkit.families.registry import get_family
    from quantkit.recipe import find_prompts, find_recipe, load_recipe, read_prompts

    path = find_recipe(name)
    loaded = load_recipe(path)
    check_thresholds(loaded)
    recipe = loaded.recipe
    if recipe.calibration.prompts is not None:
        found = find_prompts(recipe.calibration.prompts, path)
        if recipe.model.family is None:
            read_prompts(found)
        else:
            get_family(recipe.model.family).read_calibration(found)
    if recipe.compare.prompts is not None:
        read_prompts(find_prompts(recipe.compare.prompts, path))
    output.print(f"[green]ok[/] {path}", highlight=False, soft_wrap=True)
