"""``quantkit quantize``."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import gigabytes, output
from quantkit.cli.models import resolve_for_plan, resolve_model
from quantkit.cli.plan import print_plan
from quantkit.cli.progress import Bar
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.quantize.memory import CalibrationMemory
    from quantkit.quantize.run import Prepared, Quantized
    from quantkit.recipe import LoadedRecipe
    from quantkit.recipe.schema import Task

_STAGES = {
    "check": "checking the source",
    "load": "loading the model",
    "fingerprint": "fingerprinting the source",
    "calibrate": "collecting calibration inputs",
    "resume": "taking up tuned blocks",
    "tune": "tuning blocks",
    "write": "packing layers",
    "verify": "verifying layers",
    "hash": "hashing files",
}
# Files of prompts that come with quantkit.
_PROMPTS = {"t2i": "t2i.txt", "t2v": "t2v.txt", "i2v": "i2v.jsonl", "chat": "chat.txt"}


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
    device: Annotated[
        str, typer.Option("--device", help="Where to tune: auto, cpu, cuda:1, cuda:0,cuda:1 ...")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on after the blocks that a failed run has tuned.")
    ] = True,
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
    from quantkit.compare.kinds import check_thresholds
    from quantkit.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), given)
    check_thresholds(loaded)  # the comparison would refuse them, hours later
    if dry_run:  # transformers warns of keys that no plan depends on, and reads its level when it is imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    resolve = resolve_for_plan if dry_run else resolve_model
    source = resolve(model or loaded.recipe.model.id, loaded.recipe.model.revision)

    from quantkit.quantize.run import prepare, quantize

    prepared = prepare(loaded, source)
    title = f"Plan: {source}"
    if not isinstance(source, Path):
        output.print("no weights here: planned from the published configuration", highlight=False)
        title = f"Plan: {loaded.recipe.model.id}"
    print_plan(prepared.plan, title)
    if prepared.memory is not None:
        _print_memory(prepared.memory)
    if dry_run:
        return
    target = output_folder or _default_output(loaded.recipe.model.id, loaded.recipe.scheme.bits)
    with Bar() as bar:
        result = quantize(
            prepared,
            target.absolute(),
            device=device,
            overwrite=overwrite,
            resume=resume,
            on_progress=lambda step: bar(_STAGES[step.stage], step.done, step.total, step.detail, step.result),
            on_notice=bar.note,
        )
    _print_result(result, target)
    what = _next_command(model or loaded.recipe.model.id, prepared, target)
    output.print(f"next: quantkit {shlex.join(what)}", markup=False, highlight=False, soft_wrap=True)


def _next_command(source: str, prepared: Prepared, target: Path) -> list[str]:
    """Return the arguments that hold the result against its source.

    No recipe is among them: the result's own, in its manifest, is the one with what ``--set`` changed.
    """
    task = prepared.family.task
    what = ["compare", "--task", task, "--reference", source, "--candidate", str(target)]
    if (prompts := _own_prompts(prepared.loaded, task)) is not None:
        what += ["--prompts", prompts]
    return [*what, "--output", f"{target}-report"]


def _own_prompts(loaded: LoadedRecipe, task: Task) -> str | None:
    """Return the prompts to name; None if the manifest leads to them, or they are missing, which compare tells."""
    from quantkit.recipe import find_prompts
    from quantkit.recipe.locate import data_dir

    name = loaded.recipe.compare.prompts
    if name is None:
        return _PROMPTS[task]
    try:
        found = find_prompts(name, loaded.path)
    except RecipeError:
        return None
    return None if found == data_dir("prompts") / name else str(found)


def _default_output(model: str, bits: int) -> Path:
    return Path(f"{Path(model).name}-w{bits}a16")


def _print_memory(memory: CalibrationMemory) -> None:
    output.print(
        f"Calibration: {memory.samples} samples x {memory.calls} calls cache {gigabytes(memory.cached_nbytes)};\n"
        f"tuning holds up to {gigabytes(memory.peak_nbytes)}, beside {gigabytes(memory.model_nbytes)} of weights",
        highlight=False,
    )


def _print_result(result: Quantized, target: Path) -> None:
    from statistics import median

    errors = {f"{layer.component}.{layer.name}": layer.relative_l2 for layer in result.errors}
    worst = max(errors, key=errors.__getitem__)
    output.print(
        f"{len(errors)} layers packed and verified in {result.seconds:.0f} s; relative weight error "
        f"{median(errors.values()):.4f} in the median, {errors[worst]:.4f} at most ({worst})",
        highlight=False,
        soft_wrap=True,
    )
    for engine, findings in result.servability.items():
        if count := sum(finding.severity == "error" for finding in findings):
            told = f"({count} error{'s' * (count != 1)}): quantkit inspect {target} --servable {engine}"
            output.print(f"[yellow]{engine} cannot load it[/] {told}", highlight=False, soft_wrap=True)
    output.print(f"[bold]{target}[/]: {gigabytes(result.nbytes)}", highlight=False, soft_wrap=True)
