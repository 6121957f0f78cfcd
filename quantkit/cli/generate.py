"""``quantkit generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options
from quantkit.cli.console import errors, output, show_log
from quantkit.cli.models import resolve_model, sampling_recipe
from quantkit.cli.progress import Bar
from quantkit.cli.sampling import sampling_of, silence_libraries
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.generate import Job

_RANKS = "Several ranks"


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: path, hub id or 'demo'.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text.", rich_help_panel=options.WHAT)],
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .png, .jpg, .webp; .mp4, .gif or a folder of frames; .txt. "
            "Answers go to standard output without it.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Sampling; default: the model's own.", rich_help_panel=options.WHAT),
    ] = None,
    negative_prompt: options.NegativePrompt = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="Picture to start from or to ask about.", rich_help_panel=options.WHAT),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", help="Sound (WAV) to ask about.", rich_help_panel=options.WHAT)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the noise; default: one is drawn.", rich_help_panel=options.WHAT),
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    any_size: options.AnySize = False,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_scale_2: options.GuidanceScale2 = None,
    true_cfg_scale: options.TrueCfgScale = None,
    max_sequence_length: options.MaxSequenceLength = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda, xpu ...; with a number, all ranks share it.",
            rich_help_panel=options.HOW,
        ),
    ] = "auto",
    dtype: options.Dtype = "bfloat16",
    compute: options.Compute = "auto",
    backend: options.Backend = "auto",
    compile_blocks: options.Compile = False,
    cuda_graphs: options.CudaGraphs = False,
    cfg_parallel: Annotated[
        int,
        typer.Option(
            "--cfg-parallel", help="2: both branches of guidance at once, on two ranks.", rich_help_panel=_RANKS
        ),
    ] = 1,
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel", help="Ranks that share the weights.", rich_help_panel=_RANKS),
    ] = 1,
    replicas: Annotated[
        int,
        typer.Option(
            "--replicas",
            help="Ranks that draw each on their own, with this seed and the next ones.",
            rich_help_panel=_RANKS,
        ),
    ] = 1,
) -> None:
    """Generate one image, video or answer with a model, quantized or not.

    Sampling options that are not given come from the recipe that the checkpoint was made with, else from the
    model's family. With several ranks it starts them itself, or runs as one of those that torchrun has started.
    """
    from quantkit.generate import Request, prepare
    from quantkit.recipe.prompts import Prompt

    folder = resolve_model(model)
    loaded = sampling_recipe(model, folder, recipe)
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
    if seed is not None and not 0 <= seed < 2**63:
        raise RecipeError(f"--seed: must be between 0 and 2^63, not {seed}")
    job = prepare(
        Request(
            model=folder.absolute(),
            prompt=Prompt(
                prompt,
                image=None if image is None else str(image.absolute()),
                audio=None if audio is None else str(audio.absolute()),
            ),
            output=None if output_path is None else output_path.absolute(),
            seed=seed,
            sampling=(flags,) if loaded is None else (loaded.recipe.sampling, loaded.recipe.serve, flags),
            device=device,
            dtype=dtype,
            compute=compute,
            backend=backend,
            compile=compile_blocks,
            cuda_graphs=cuda_graphs,
            cfg_parallel=cfg_parallel,
            tensor_parallel=tensor_parallel,
            replicas=replicas,
            overwrite=overwrite,
            any_size=any_size,
        )
    )
    if job.ranks == 1:
        run_rank(job)
        return
    from quantkit_runtime.parallel.launch import launch, launched

    if launched():
        run_rank(job)
    else:
        launch(run_rank, (job,), job.ranks)


def run_rank(job: Job) -> None:
    """Run a job in this process, alone or as one of several ranks; the first shows progress and result."""
    from quantkit.generate import run

    silence_libraries()
    show_log("quantkit_runtime")
    unit = "token" if job.request.output is None or job.request.output.suffix == ".txt" else "step"
    with Bar() as bar:
        made = run(job, lambda step, steps: bar("generating", step, steps, f"{unit} {step} of {steps}"))
    if made is None:
        return
    if made.output is None:
        assert made.text is not None
        output.print(made.text, markup=False, highlight=False, soft_wrap=True)
        return
    seed = "" if made.text is not None else f"seed {made.seed}, "
    errors.print(f"{seed}{made.steps} {unit}s in {made.seconds:.1f} s", highlight=False, soft_wrap=True)
    output.print(str(made.output), markup=False, highlight=False, soft_wrap=True)
