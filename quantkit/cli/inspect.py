"""``quantkit inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantkit.cli.console import errors, gigabytes, new_table, output
from quantkit.cli.models import resolve_model

if TYPE_CHECKING:
    from quantkit.inspect.checkpoint import Summary
    from quantkit.inspect.servability import Finding

_FAIL = 1
_COLORS = {"error": "red", "warning": "yellow", "info": "dim"}


def command(
    checkpoint: Annotated[str, typer.Argument(help="A model folder, quantized or not.")],
    servable: Annotated[
        Literal["vllm-omni", "diffusers", "transformers"] | None,
        typer.Option("--servable", help="Check instead whether this engine can load it; exit code 1 if not."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a checkpoint: components, sizes, schemes, where it comes from; or what hinders serving it."""
    folder = resolve_model(checkpoint)
    if servable is not None:
        from quantkit.inspect.servability import check_servability

        findings = check_servability(folder, servable)
        if as_json:
            _print_json(
                {"checkpoint": str(folder), "target": servable, "findings": [vars(one) for one in findings]}
            )
        else:
            _print_findings(folder, servable, findings)
        if any(finding.severity == "error" for finding in findings):
            raise typer.Exit(_FAIL)
        return

    from dataclasses import asdict

    from quantkit.inspect.checkpoint import summarize

    summary = summarize(folder)
    if as_json:
        _print_json(asdict(summary))
    else:
        _print_summary(summary)


def _print_json(data: object) -> None:
    import json

    typer.echo(json.dumps(data, indent=2, default=str))


def _print_findings(folder: Path, target: str, findings: list[Finding]) -> None:
    from rich.markup import escape

    if findings:
        table = new_table(f"{folder} for {target}", "severity", "rule", "where", "what", "mend")
        for finding in findings:
            where = f"{finding.model}: {finding.place}" if finding.model else finding.place
            color = _COLORS[finding.severity]
            texts = (finding.rule, where, finding.what, finding.mend)
            table.add_row(f"[{color}]{finding.severity}[/]", *map(escape, texts))
        output.print(table)
    counts = {word: sum(finding.severity == word for finding in findings) for word in ("error", "warning")}
    verdict = "[bold red]FAIL[/]" if counts["error"] else "[bold green]PASS[/]"
    told = ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items())
    output.print(f"{verdict} {target}: {told} in {folder}", highlight=False, soft_wrap=True)


def _print_summary(summary: Summary) -> None:
    from quantkit.recipe.load import MANIFEST

    table = new_table(
        f"{summary.folder} ({summary.class_name})",
        *("component", "class", "size", "tensors", "quantized layers", "dtypes by size"),
        right=("size", "tensors"),
    )
    for part in summary.components:
        table.add_row(
            part.name,
            part.class_name,
            gigabytes(part.nbytes),
            str(part.tensors or ""),
            "\n".join(f"{count} of {scheme}" for scheme, count in part.schemes.items()),
            ", ".join(part.dtypes),
        )
    table.add_section()
    table.add_row("all", "", gigabytes(sum(part.nbytes for part in summary.components)))
    output.print(table)
    for part in summary.components:
        if part.quantization is not None:
            shown = {key: value for key, value in part.quantization.items() if key != "extra_config"}
            output.print(f"{part.name}.quantization_config: {shown}", highlight=False, soft_wrap=True)
    match summary.provenance:
        case None:
            pass
        case {
            "created": made,
            "source": {"id": source},
            "recipe": {"name": recipe, "sha256": str(sha256), "overrides": [*overrides]},
        }:
            changed = "".join(f" --set {text}" for text in overrides)
            text = f"made {made} from {source} by recipe {recipe} (sha256 {sha256[:12]})"
            text += f" with{changed}" if changed else ""
            output.print(text, markup=False, highlight=False, soft_wrap=True)
        case _:
            text = f"warning: {summary.folder / MANIFEST}: does not say what the checkpoint was made from"
            errors.print(text, markup=False, highlight=False, soft_wrap=True)
