"""Starting vLLM-Omni for ``quantkit serve``."""

from __future__ import annotations

import os
import shlex
from typing import NoReturn

from quantkit.cli.console import errors
from quantkit.serving.vllm_omni import Wanted, find_program, plan_launch


def start(wanted: Wanted) -> NoReturn:
    """Say what is started and what is lost on the way, and become vLLM-Omni.

    Raises:
        QuantkitError: It is not installed, could not load the model, or a setting has no meaning for it.
    """
    launch = plan_launch(wanted)
    program = find_program()
    for finding in launch.findings or ():
        _say("yellow", finding.severity, f"{finding.place}: {finding.what}; {finding.mend}")
    for line in launch.untranslated:
        _say("yellow", "not translated", line)
    for line in launch.differences:
        _say("dim", "differs", line)
    _say("green", "starting", shlex.join(launch.arguments))
    os.execve(program, launch.arguments, {**os.environ, **launch.environment})  # noqa: S606  (no shell is wanted)


def _say(color: str, kind: str, text: str) -> None:
    errors.print(f"[{color}]{kind}:[/] ", end="")
    errors.print(text, markup=False, highlight=False, soft_wrap=True)
