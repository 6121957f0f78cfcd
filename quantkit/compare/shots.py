"""What both models are asked for: prompts, each with every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quantkit.recipe.prompts import Prompt

Role = Literal["reference", "candidate"]
StepCallback = Callable[[int, int], None]
"""Called after every step with the steps done and the number of steps."""


@dataclass(frozen=True)
class Shot:
    """One output to make: index of the prompt, the prompt, the seed."""

    index: int
    prompt: Prompt
    seed: int

    def __str__(self) -> str:
        text = self.prompt.text if len(self.prompt.text) <= 60 else f"{self.prompt.text[:57]}..."
        return f'prompt {self.index} "{text}", seed {self.seed}'


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        role: The model that runs.
        shot: The output in work; None while the model loads.
        step: Steps done of it.
        steps: Steps it takes, 0 while the model loads.
        done: Outputs done of both models, with the fraction of the one in work.
        total: Outputs of both models.
    """

    role: Role
    shot: Shot | None
    step: int
    steps: int
    done: float
    total: int


ProgressCallback = Callable[[Progress], None]
