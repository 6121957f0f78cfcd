"""``quantkit verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.console import output
from quantkit.cli.models import resolve_model
from quantkit.cli.progress import Bar

_FAIL = 1


def command(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint, quantkit's or auto-round's own.")],
    source: Annotated[
        str | None,
        typer.Option("--source", help="The 16-bit original: also check every tensor's values against it."),
    ] = None,
) -> None:
    """Check a checkpoint tensor by tensor; exit code 1 if anything is wrong."""
    folder = resolve_model(checkpoint)
    original = None if source is None else resolve_model(source)

    from quantkit.quantize.verify import verify

    with Bar() as bar:
        result = verify(
            folder,
            source=original,
            on_progress=lambda step: bar(f"{step.stage} {folder.name}", step.done, step.total, step.detail),
        )
    for problem in result.problems:
        output.print(f"[red]✗[/] {problem}", highlight=False, soft_wrap=True)
    for line in result.checked:
        output.print(f"[dim]checked: {line}[/]", highlight=False)
    layers = sum(map(len, result.layers.values()))
    if result.problems:
        output.print(f"[bold red]FAIL[/] {len(result.problems)} problems in {folder}", soft_wrap=True)
        raise typer.Exit(_FAIL)
    output.print(f"[bold green]PASS[/] {layers} packed layers, no problem", highlight=False)
