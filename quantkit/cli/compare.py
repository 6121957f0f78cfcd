"""``quantkit compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options
from quantkit.cli.console import errors, new_table, output, show_log
from quantkit.cli.models import recipe_for, resolve_model, resolve_recorded
from quantkit.cli.progress import Bar
from quantkit.cli.sampling import sampling_of, silence_libraries
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.compare.result import Comparison
    from quantkit.compare.shots import Progress
    from quantkit.recipe import LoadedRecipe
    from quantkit.recipe.prompts import Prompt
    from quantkit.recipe.schema import Task

EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
_COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
_MODELS = "Models and output"


def command(
    candidate: Annotated[
        str,
        typer.Option("--candidate", "-c", help="Model to judge: path, hub id or 'demo'.", rich_help_panel=_MODELS),
    ],
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=_MODELS)
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Model to hold it against; default: the recipe's.", rich_help_panel=_MODELS
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Prompts, seeds, sampling, thresholds; default: the candidate's own.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output.", rich_help_panel=_MODELS)
    ] = False,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit with 1 on FAIL and 3 on INCONCLUSIVE.", rich_help_panel=_MODELS),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", help="t2i, t2v, i2v or chat; default: the recipe's.", rich_help_panel=options.WHAT),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text; repeatable.", rich_help_panel=options.WHAT)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="File of prompts, by path or by name.", rich_help_panel=options.WHAT),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", help="Picture that every --prompt starts from (i2v).", rich_help_panel=options.WHAT
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="Seeds, e.g. 1,2,3; each with every prompt.", rich_help_panel=options.WHAT),
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    any_size: options.AnySize = False,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_scale_2: options.GuidanceScale2 = None,
    true_cfg_scale: options.TrueCfgScale = None,
    negative_prompt: options.NegativePrompt = None,
    max_sequence_length: options.MaxSequenceLength = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "bfloat16",
    compute: options.Compute = "auto",
    backend: options.Backend = "auto",
    compile_blocks: options.Compile = False,
    lpips_backbone: Annotated[
        Path | None,
        typer.Option(
            "--lpips-backbone", help="AlexNet weights; default: torch hub's cache.", rich_help_panel=options.HOW
        ),
    ] = None,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Run the reference's first prompt twice, to see what differs by itself.",
            rich_help_panel=options.HOW,
        ),
    ] = True,
) -> None:
    """Compare a candidate with a reference, same prompts and seeds, step by step or token by token, and judge it.

    Writes report.html, result.json and the images or videos. The verdict comes from the recipe's thresholds, else
    from built-in ones; it decides the exit code only with --gate.
    """
    from quantkit.recipe.load import MANIFEST

    candidate_folder = resolve_model(candidate)
    loaded = recipe_for(candidate, candidate_folder, recipe)
    if reference is None and loaded is None:
        raise RecipeError("--reference: give the model to compare with, or a recipe that names it")
    flags = sampling_of(
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=negative_prompt,
        max_sequence_length=max_sequence_length,
        max_new_tokens=max_new_tokens,
    )
    asked = _prompts(prompt, image, prompts, loaded)
    numbers = _seeds(seeds, loaded)
    if reference is None:
        assert loaded is not None
        reference, revision = loaded.recipe.model.id, loaded.recipe.model.revision
        if loaded.path.name == MANIFEST:
            reference_folder = resolve_recorded(reference, revision, loaded.path)
        else:
            reference_folder = resolve_model(reference, revision)
    else:
        reference_folder = resolve_model(reference)

    from quantkit.compare.request import Request
    from quantkit.compare.run import compare

    _check_reference(reference_folder, candidate_folder)
    section = loaded.recipe.compare if loaded is not None else None
    given = section is not None and bool(section.thresholds)
    request = Request(
        reference=reference_folder,
        candidate=candidate_folder,
        prompts=asked,
        seeds=numbers,
        reference_label=_label(reference),
        candidate_label=_label(candidate),
        task=_task(task, loaded),
        sampling=(flags,) if loaded is None else (loaded.recipe.sampling, loaded.recipe.compare, flags),
        thresholds=section.thresholds if section is not None and given else None,
        thresholds_source=f"{loaded.path}: compare.thresholds" if loaded is not None and given else "",
        any_size=any_size,
        device=device,
        dtype=dtype,
        compute=compute,
        backend=backend,
        compile=compile_blocks,
        lpips_backbone=lpips_backbone,
        noise_floor=noise_floor,
        recipe=str(loaded.path) if loaded is not None else None,
        recipe_sha256=loaded.sha256 if loaded is not None else None,
        command=("quantkit", *sys.argv[1:]),
    )
    silence_libraries()
    if compile_blocks:
        show_log("quantkit_runtime")
    with Bar() as bar:
        result = compare(
            request, output_folder.absolute(), overwrite=overwrite, on_progress=lambda now: _show(bar, now)
        )
    _print_result(result, output_folder)
    if gate:
        raise typer.Exit(EXIT_CODES[result.verdict.outcome])


def _check_reference(reference: Path, candidate: Path) -> None:
    """Refuse a reference that is the candidate, which would pass any gate, and warn of one that is quantized."""
    from quantkit.checkpoint import open_model
    from quantkit.compare.footprint import quantization_of

    if reference.samefile(candidate):
        raise RecipeError(f"--reference: {reference} is the candidate itself; give the model to compare it with")
    if schemes := quantization_of(open_model(reference)):
        told = "; ".join(f"{component}: {scheme}" for component, scheme in schemes.items())
        errors.print(
            f"warning: the reference is itself quantized ({told}): what it has lost is not measured",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _label(model: str) -> str:
    """Return what a user typed for a model, of a path the last part alone."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def _prompts(
    texts: list[str] | None, image: Path | None, file: str | None, loaded: LoadedRecipe | None
) -> tuple[Prompt, ...]:
    from quantkit.recipe import find_prompts, read_prompts
    from quantkit.recipe.prompts import Prompt

    if texts and file is not None:
        raise RecipeError("--prompt, --prompts: give one of the two")
    if image is not None and not texts:
        raise RecipeError("--image: goes with --prompt; a file of prompts names an image for each")
    if texts:
        return tuple(Prompt(text=text, image=str(image) if image is not None else None) for text in texts)
    if file is not None:
        return tuple(read_prompts(find_prompts(file, None)))
    if loaded is not None and loaded.recipe.compare.prompts is not None:
        return tuple(read_prompts(find_prompts(loaded.recipe.compare.prompts, loaded.path)))
    raise RecipeError("prompts: give --prompt, --prompts or a recipe with compare.prompts")


def _seeds(text: str | None, loaded: LoadedRecipe | None) -> tuple[int, ...]:
    if text is None:
        return loaded.recipe.compare.seeds if loaded is not None else (0,)
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"--seeds: '{text}' is no list of whole numbers such as 1,2,3") from error
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise RecipeError(f"--seeds: '{text}' has a seed that is not between 0 and 2^63")
    return seeds


def _task(text: str | None, loaded: LoadedRecipe | None) -> Task:
    if text is None:
        return loaded.recipe.model.task if loaded is not None else "t2i"
    tasks: tuple[Task, ...] = ("t2i", "t2v", "i2v", "chat")
    for task in tasks:
        if text == task:
            return task
    raise RecipeError(f"--task: '{text}' is unknown; use one of {', '.join(tasks)}")


def _show(bar: Bar, now: Progress) -> None:
    what = "loading" if now.shot is None else f"prompt {now.shot.index}, seed {now.shot.seed}"
    if now.steps:
        what += f", step {now.step} of {now.steps}"
    bar("comparing", now.done, now.total, f"{now.role}: {what}")


def _print_result(result: Comparison, folder: Path) -> None:
    from quantkit.compare.kinds import KINDS
    from quantkit.compare.metrics import METRICS
    from quantkit.compare.numbers import milliseconds, short, size, times
    from quantkit.compare.tables import doubt_times, interval_of, needs_words
    from quantkit.gate.thresholds import describe

    verdict = result.verdict
    numbers = ("mean", "90 % interval", "wanted")
    table = new_table("", "metric", *numbers, "verdict", right=numbers)
    for row in verdict.rows:
        table.add_row(
            row.metric,
            f"{short(row.value)} {METRICS[row.metric].unit}".strip() if row.value is not None else "-",
            interval_of(row) or "-",
            describe(row.threshold),
            f"[bold {_COLOURS[row.outcome]}]{row.outcome}[/]",
        )
    output.print(table)
    for row in filter(needs_words, verdict.rows):
        output.print(f"{row.metric}: {row.reason}", markup=False, highlight=False, soft_wrap=True)
    output.print(f"thresholds: {result.thresholds_source}", markup=False, highlight=False, soft_wrap=True)
    reference, candidate = result.reference, result.candidate
    ours, theirs = sum(reference.disk_bytes.values()), sum(candidate.disk_bytes.values())
    line = f"on disk {size(theirs)} instead of {size(ours)} ({times(theirs / ours)})"
    if reference.step_ms is not None and candidate.step_ms is not None:
        before, after = reference.step_ms.median, candidate.step_ms.median
        step = KINDS[result.task].step
        line += f"; {step} {milliseconds(after)} instead of {milliseconds(before)} ({times(after / before)})"
        line += doubt_times(result)
    output.print(line, highlight=False)
    colour = _COLOURS[verdict.outcome]
    output.print(f"[bold {colour}]{verdict.outcome}[/] ", end="")
    output.print(verdict.reason, markup=False, highlight=False, soft_wrap=True)
    output.print(str(folder / "report.html"), markup=False, highlight=False, soft_wrap=True)
