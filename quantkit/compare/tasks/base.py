"""What a comparison asks of a task: load a model, record an output, score a candidate's against a reference's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from quantkit.compare.result import Output
from quantkit.compare.shots import Shot, StepCallback
from quantkit.errors import CheckpointError, RecipeError
from quantkit.recipe.schema import Sampling

if TYPE_CHECKING:
    import torch


class Recording(Protocol):
    """What every task's recordings have in common."""

    @property
    def step_ms(self) -> tuple[float, ...]:
        """Milliseconds of every step but the first, which pays for warm-up."""

    @property
    def total_s(self) -> float:
        """Seconds from call to output."""


R = TypeVar("R", bound=Recording)


@dataclass(frozen=True)
class Context:
    """What a task works with.

    Attributes:
        shots: What both models are asked for.
        folder: Where images and videos go; it becomes the output.
        work: For files that are not part of the output.
        device: Where the models run.
        dtype: Of 16 (or 32) bit weights and activations.
        compute: How packed layers compute.
        backend: Kernel backend of packed layers.
        compile: Whether repeated blocks are compiled.
        family: Of both models.
        call_kwargs: Sampling, as arguments of the call.
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.
    """

    shots: Sequence[Shot]
    folder: Path
    work: Path
    device: torch.device
    dtype: torch.dtype
    compute: str
    backend: str
    compile: bool
    family: Any
    call_kwargs: Mapping[str, Any]
    lpips_backbone: Path | None

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class Score:
    """What one output of the candidate is worth.

    Attributes:
        curves: Curve -> values along its axis.
        metrics: Metric -> value; empty if it cannot be scored.
        failure: Why it cannot be scored, None if all is well.
        output: What both models made.
    """

    curves: dict[str, tuple[float, ...]]
    metrics: dict[str, float]
    failure: str | None
    output: Output


class Task(ABC, Generic[R]):
    """One task with what it remembers of the reference.

    Args:
        context: What it works with.

    Attributes:
        unavailable: Metric -> why it cannot be computed here.
        timesteps: The scheduler's, empty where there is none.
        made: Sizes of what the reference makes; pipelines round those that they are asked for.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.unavailable: dict[str, str] = {}
        self.timesteps: tuple[float, ...] = ()
        self.made = Sampling()

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load a model; what comes back has ``components``, a mapping of name to module.

        Raises:
            CheckpointError: If the folder cannot be loaded.
            RecipeError: If the backend cannot run here.
        """

    @abstractmethod
    def record(self, model: Any, index: int, on_step: StepCallback) -> R:
        """Make the output of one shot."""

    @abstractmethod
    def failure(self, recording: R) -> str | None:
        """Return why a recording is of no use, e.g. values that are not finite; None if all is well."""

    @abstractmethod
    def keep(self, index: int, recording: R) -> None:
        """Remember what the reference did."""

    @abstractmethod
    def score(self, index: int, recording: R, *, save: bool) -> Score:
        """Hold a recording against what was kept of the reference.

        Args:
            index: Of the shot.
            recording: What the candidate did, or the reference once more.
            save: Whether its output is written beside the result.
        """

    def close(self) -> None:
        """Forget what was kept of the reference."""


def load_with(loader: Callable[..., Any], folder: Path, context: Context) -> Any:
    """Call a loader of the runtime, its errors turned into quantkit's.

    What is chosen for packed layers goes to models that have some: it is refused for the BF16 reference.
    """
    from quantkit_runtime.choice import is_packed
    from quantkit_runtime.errors import BackendUnavailableError, QuantkitRuntimeError

    try:
        chosen = {"compute": context.compute, "backend": context.backend} if is_packed(folder) else {}
        return loader(folder, device=context.device, dtype=context.dtype, compile=context.compile, **chosen)
    except BackendUnavailableError as error:
        raise RecipeError(str(error)) from error
    except QuantkitRuntimeError as error:
        raise CheckpointError(str(error)) from error
