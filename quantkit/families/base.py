"""What quantkit asks of a model family.

A family that is a diffusers pipeline with Linears in repeated blocks needs no more than an instance of
`DiffusionFamily`; see ``flux.py``. One that is a single transformers model is a
`quantkit.families.language.LanguageFamily`.

Every tensor and layer name that passes between a family and the rest of quantkit is that of the checkpoint's files,
whatever the library calls the module that it loads them into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError
from quantkit.recipe.prompts import read_prompts
from quantkit.recipe.schema import Sampling, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Linear:
    """A Linear layer of the architecture."""

    name: str
    in_features: int
    out_features: int
    keep_reason: str | None
    """Why the family leaves it in 16 bit; None if it is quantized by default."""
    optional: bool = False
    """Whether a recipe that names it in ``layers.include`` quantizes it, although there is a reason to keep it."""


@dataclass(frozen=True)
class Family(ABC):
    """What is particular to one kind of model.

    Attributes:
        name: As recipes spell it.
        task: What its models do.
        blocks: For each component that is quantized, the module lists that hold its repeated blocks. Linears
            inside are quantized, those outside (embedders, final norm and projection) stay in 16 bit, as in
            the published checkpoints.
        sampling: Defaults of every sampling key that the models take. A key that is None here is not a parameter
            of the family.
        aliases: Other names of blocks: libraries that rename modules while loading look for these in a
            ``quantization_config``.
        foreign: How the names of tensors begin that are of another network, although an index joins them to a
            component's own. They are taken as they are.
    """

    name: str
    task: Task
    blocks: Mapping[str, tuple[str, ...]]
    sampling: Sampling
    aliases: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    def sampling_for(self, *layers: Sampling) -> Sampling:
        """Return the family's sampling defaults, overlaid by each of the given in turn.

        Raises:
            RecipeError: If one of them names a key that the family's models do not take.
        """
        result = self.sampling
        for layer in layers:
            unknown = layer.given().keys() - self.sampling.given().keys()
            if unknown:
                raise RecipeError(
                    f"sampling: {self.name} takes no {', '.join(sorted(unknown))} "
                    f"(it takes {', '.join(self.sampling.given())})"
                )
            result = layer.over(result)
        return result

    def call_kwargs(self, sampling: Sampling) -> dict[str, Any]:
        """Return the keyword arguments of a call that samples, without prompt, generator and callback."""
        return dict(sampling.given())

    @abstractmethod
    def build(self, component: Component) -> torch.nn.Module:
        """Build the component's architecture on the meta device, from its configuration alone.

        Raises:
            MissingExtraError: If the library that has the class is not installed.
            CheckpointError: If the configuration does not describe the class.
        """

    def tensor_shapes(self, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that a checkpoint of the architecture holds."""
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @abstractmethod
    def linears(self, component: Component, model: torch.nn.Module) -> Iterator[Linear]:
        """Yield every Linear of a component in the order of its modules."""

    def quantized_config(self, component: Component, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Return the component's ``config.json`` with a ``quantization_config`` wherever loaders look for it."""
        return {**component.config, "quantization_config": dict(quantization)}

    def read_calibration(self, path: Path) -> list[Any]:
        """Read a file of what calibration feeds the model, by default prompts; JSON-ready.

        Raises:
            RecipeError: If it cannot be read as such.
        """
        return list(read_prompts(path))

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load a reference model for calibration, on the CPU.

        Args:
            folder: A local model folder.
            dtype: Of the floating-point weights.
        """


@dataclass(frozen=True)
class DiffusionFamily(Family):
    """A family whose models are diffusers pipelines."""

    def build(self, component: Component) -> torch.nn.Module:
        """Build a class of diffusers, see `Family.build`."""
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise MissingExtraError(error.name or "diffusers", "quantize") from error
        model_class = getattr(diffusers, component.class_name, None)
        if component.library != "diffusers" or model_class is None:
            raise CheckpointError(
                f"{component.folder.parent / 'model_index.json'}: {component.name}: "
                f"{component.library}.{component.class_name} is no class of the installed diffusers"
            )
        config = {key: value for key, value in component.config.items() if key != "quantization_config"}
        try:
            with torch.device("meta"):
                model: torch.nn.Module = model_class.from_config(config)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{component.folder / 'config.json'}: does not describe a {component.class_name}: {error}"
            ) from error
        return model

    def linears(self, component: Component, model: torch.nn.Module) -> Iterator[Linear]:
        """Yield every Linear; those outside the blocks stay in 16 bit."""
        import torch

        blocks = tuple(f"{name}." for name in self.blocks[component.name])
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                reason = None if name.startswith(blocks) else "outside the blocks"
                yield Linear(name, module.in_features, module.out_features, reason)

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load a pipeline, see `Family.load`."""
        from quantkit_runtime import load_pipeline

        return load_pipeline(folder, device="cpu", dtype=dtype)
