"""``quantkit inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import gigabytes, new_table, output
from quantkit.cli.models import resolve_model

if TYPE_CHECKING:
    from quantkit.inspect.checkpoint import Summary


def command(
    checkpoint: Annotated[str, typer.Argument(help="A pipeline folder, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a checkpoint: components, sizes, schemes, where it comes from."""
    from quantkit.inspect.checkpoint import summarize

    summary = summarize(resolve_model(checkpoint))
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(summary), indent=2, default=str))
        return
    _print(summary)


def _print(summary: Summary) -> None:
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
    if summary.provenance is not None:
        recipe, source = summary.provenance["recipe"], summary.provenance["source"]
        output.print(
            f"made {summary.provenance['created']} from {source['id']} by recipe {recipe['name']} "
            f"(sha256 {recipe['sha256'][:12]})",
            highlight=False,
        )
