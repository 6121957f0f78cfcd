"""``quantkit``: the verbs, and what happens when one of them fails.

Exit codes: 0 done or PASS, 1 FAIL, 2 a mistake of the user's or a run that could not be carried out (one clear
line, ``--debug`` for the traceback), 3 INCONCLUSIVE, 70 a defect of quantkit's own, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantkit import __version__
from quantkit.cli import compare, inspect, quantize, recipes, serve, verify
from quantkit.cli.console import errors
from quantkit.errors import QuantkitError
from quantkit_runtime.errors import QuantkitRuntimeError

USER_ERROR = 2
DEFECT = 70  # EX_SOFTWARE of sysexits.h

app = typer.Typer(
    name="quantkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.command)
app.command("compare")(compare.command)
app.command("serve")(serve.command)
app.command("verify")(verify.command)
app.command("inspect")(inspect.command)
app.add_typer(recipes.app, name="recipes")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantize multimodal and diffusion models to 4 bit, prove how close they stay to BF16, serve them."""


def main() -> None:
    """Run the command line of this process and exit."""
    # Read before Typer does, so that it holds for mistakes in the options too, and wherever it stands.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="quantkit", standalone_mode=True)
    except (QuantkitError, QuantkitRuntimeError) as error:
        _fail(error, debug)
    except Exception as error:  # noqa: BLE001  (the last border: a defect must not look like a FAIL)
        _fail_unexpectedly(error, debug)


def _fail(error: Exception, debug: bool) -> None:
    if debug:
        errors.print_exception()
    for line in str(error).splitlines():
        errors.print(f"[bold red]error:[/] {_escape(line)}", soft_wrap=True, highlight=False)
    if not debug and getattr(error, "__notes__", None):
        errors.print("[dim]--debug shows more[/]")
    sys.exit(USER_ERROR)


def _fail_unexpectedly(error: Exception, debug: bool) -> None:
    if debug:
        errors.print_exception()
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    errors.print(f"[bold red]defect in quantkit:[/] {_escape(reason)}", soft_wrap=True, highlight=False)
    errors.print("[dim]please report it with the output of --debug[/]")
    sys.exit(DEFECT)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
