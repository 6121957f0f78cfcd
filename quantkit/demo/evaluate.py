"""Attribute scores of a demo pipeline on held-out captions.

``python -m quantkit.demo.evaluate [--model DIR]`` prints the table that the model card quotes.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FluxPipeline

from quantkit.demo import path
from quantkit.demo.captions import held_out_captions
from quantkit.demo.scenes import CANVAS_PX
from quantkit.demo.scorer import ATTRIBUTES, score


@dataclass(frozen=True)
class Sampling:
    """How the demo pipeline is sampled; the defaults are the ones its model card recommends.

    Attributes:
        num_inference_steps: denoising steps.
        true_cfg_scale: scale of classifier-free guidance with an empty negative prompt; 1 is none.
        max_sequence_length: T5 tokens that a caption is padded to.
    """

    num_inference_steps: int = 20
    true_cfg_scale: float = 2.0
    max_sequence_length: int = 48


def sample(
    pipeline: FluxPipeline, captions: list[str], seeds: list[int], sampling: Sampling
) -> list[npt.NDArray[np.uint8]]:
    """Draw one 64 x 64 RGB image for each caption, with its own seed."""
    images = pipeline(
        prompt=captions,
        negative_prompt=[""] * len(captions),
        height=CANVAS_PX,
        width=CANVAS_PX,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pil",
        **asdict(sampling),
    ).images
    return [np.asarray(image) for image in images]


def evaluate(
    pipeline: FluxPipeline,
    count: int,
    sampling: Sampling,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[int, int]]:
    """Score a pipeline on the first ``count`` held-out captions; caption i is drawn with seed i.

    Args:
        pipeline: a FLUX pipeline, on any device.
        count: number of captions.
        sampling: steps, guidance, caption length.
        batch_size: captions drawn at a time.
        on_progress: called with the number of captions done after every batch.

    Returns:
        For each attribute how many captions got it right, of how many that name it; ``all`` counts captions with
        every attribute right.
    """
    totals = {name: [0, 0] for name in (*ATTRIBUTES, "all")}
    pairs = held_out_captions(count)
    for start in range(0, count, batch_size):
        batch = pairs[start : start + batch_size]
        seeds = list(range(start, start + len(batch)))
        images = sample(pipeline, [caption for _, caption in batch], seeds, sampling)
        for (scene, _), image in zip(batch, images, strict=True):
            verdicts = score(image, scene)
            for name, right in {**verdicts, "all": all(verdicts.values())}.items():
                totals[name][0] += right
                totals[name][1] += 1
        if on_progress is not None:
            on_progress(start + len(batch))
    return {name: (right, asked) for name, (right, asked) in totals.items()}


def format_scores(scores: dict[str, tuple[int, int]]) -> str:
    """Format scores as one line, e.g. ``colour 99.0 %, shape 98.2 %``."""
    return ", ".join(f"{name} {100 * right / max(asked, 1):.1f} %" for name, (right, asked) in scores.items())


def main() -> None:
    """Run the evaluation from the command line."""
    defaults = Sampling()
    parser = argparse.ArgumentParser(prog="python -m quantkit.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=path(), help="pipeline directory (default: the embedded one)")
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=defaults.num_inference_steps)
    parser.add_argument("--true-cfg-scale", type=float, default=defaults.true_cfg_scale)
    parser.add_argument("--max-sequence-length", type=int, default=defaults.max_sequence_length)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    options = parser.parse_args()
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console = Console()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipeline = FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(options.steps, options.true_cfg_scale, options.max_sequence_length)
    started = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=options.captions)

        def show(done: int) -> None:
            progress.update(task, completed=done)
            if not console.is_terminal:
                console.print(f"drew {done} of {options.captions}")

        scores = evaluate(pipeline, options.captions, sampling, options.batch_size, show)
    seconds = time.perf_counter() - started
    table = Table(
        title=f"{options.captions} held-out captions, {sampling.num_inference_steps} steps, "
        f"true CFG {sampling.true_cfg_scale:g}, {seconds:.0f} s on {device}"
    )
    for column in ("attribute", "right", "of", "share"):
        table.add_column(column, justify="left" if column == "attribute" else "right")
    for name, (right, asked) in scores.items():
        table.add_row(name, str(right), str(asked), f"{100 * right / max(asked, 1):.1f} %")
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"sampling": asdict(sampling), "scores": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
