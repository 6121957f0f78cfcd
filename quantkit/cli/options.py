"""Options that several verbs have: what to generate, and how models run; each has one name and one help text."""

from __future__ import annotations

from typing import Annotated

import typer

WHAT = "What to generate"
HOW = "How to run"

NegativePrompt = Annotated[
    str | None, typer.Option("--negative-prompt", help="What to guide away from.", rich_help_panel=WHAT)
]
Height = Annotated[int | None, typer.Option("--height", help="Pixels.", rich_help_panel=WHAT)]
Width = Annotated[int | None, typer.Option("--width", help="Pixels.", rich_help_panel=WHAT)]
NumFrames = Annotated[int | None, typer.Option("--num-frames", help="Frames of a video.", rich_help_panel=WHAT)]
AnySize = Annotated[
    bool,
    typer.Option("--any-size", help="Allow more than 2048 x 2048 pixels or 257 frames.", rich_help_panel=WHAT),
]
NumInferenceSteps = Annotated[
    int | None, typer.Option("--num-inference-steps", help="Denoising steps.", rich_help_panel=WHAT)
]
GuidanceScale = Annotated[
    float | None, typer.Option("--guidance-scale", help="Guidance scale.", rich_help_panel=WHAT)
]
GuidanceScale2 = Annotated[
    float | None,
    typer.Option("--guidance-scale-2", help="Guidance scale of the second expert.", rich_help_panel=WHAT),
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option("--true-cfg-scale", help="Classifier-free guidance, above 1.", rich_help_panel=WHAT),
]
MaxSequenceLength = Annotated[
    int | None, typer.Option("--max-sequence-length", help="Text tokens.", rich_help_panel=WHAT)
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Tokens of an answer at most.", rich_help_panel=WHAT)
]

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, xpu ...", rich_help_panel=HOW)]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.", rich_help_panel=HOW)]
Compute = Annotated[
    str, typer.Option("--compute", help="Of packed layers: auto, 16bit or fp8.", rich_help_panel=HOW)
]
Backend = Annotated[
    str, typer.Option("--backend", help="Kernels of packed layers: auto, or one by name.", rich_help_panel=HOW)
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the repeated blocks: quicker steps, a slow first.", rich_help_panel=HOW
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option("--cuda-graphs", help="Record denoising steps and replay them.", rich_help_panel=HOW),
]
