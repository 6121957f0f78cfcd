"""What a servability rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.inspect.quantized import Checkpoint, QuantizedModel

Target = Literal["vllm-omni", "diffusers", "transformers"]
Severity = Literal["error", "warning", "info"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Breach:
    """One place where a rule is broken.

    Attributes:
        where: The tensor, layer, key or file at fault; files by their full path.
        what: What is wrong with it.
        mend: What to do about it.
        model: The component or stage; empty if it is about the whole checkpoint.
    """

    where: str
    what: str
    mend: str
    model: str = ""


Check = Callable[[Checkpoint], Iterator[Breach]]


@dataclass(frozen=True)
class Rule:
    """A condition that a serving engine puts on a checkpoint.

    Attributes:
        id: Its name in findings.
        severity: ``error``: will not load, or loads and computes something else. ``warning``: loads, with a limit.
            ``info``: good to know.
        targets: The engines that have this condition.
        check: Yields every place where a checkpoint breaks it; its docstring states the condition.
    """

    id: str
    severity: Severity
    targets: tuple[Target, ...]
    check: Check


def each_model(check: Callable[[QuantizedModel], Iterator[Breach]]) -> Check:
    """Make a check of one quantized model a check of a whole checkpoint."""

    def check_all(checkpoint: Checkpoint) -> Iterator[Breach]:
        for model in checkpoint.models:
            for breach in check(model):
                yield Breach(breach.where, breach.what, breach.mend, model.name)

    check_all.__doc__ = check.__doc__
    return check_all
