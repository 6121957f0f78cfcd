"""What quantkit asks of a model family.

A family that is a diffusers pipeline with Linears in repeated blocks needs no more than an instance of
`DiffusionFamily`; see ``flux.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, Pipeline
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError
from quantkit.families.family import Family
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling

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


@dataclass(frozen=True)
class BlockInputs:
    """What the repeated blocks of a component get while one calibration image is drawn, in 16 bit.

    Attributes:
        calls: How often the component runs: denoising steps times guidance branches.
        passed_nbytes: Per call, of what one block hands to the next: hidden states of image and text.
        shared_nbytes: Per call, of what every block gets alike, e.g. time embedding and rotary embedding.
    """

    calls: int
    passed_nbytes: int
    shared_nbytes: int


@dataclass(frozen=True)
class DiffusionFamily(Family):
    """A family whose models are diffusers pipelines.

    Attributes:
        blocks: For each component that can be quantized, the module lists that hold its repeated blocks. Linears
            inside are quantized, those outside (embedders, final norm and projection) stay in 16 bit, as in
            the published checkpoints.
        optional: Components of ``blocks`` that are quantized only if a recipe names them in
            ``layers.components``. They are rounded to nearest: calibration reaches the other components alone.
        kept: Why modules outside the blocks stay in 16 bit, by the beginning of their names, where the family
            knows more than that they are outside.
        block_outputs: For block classes that auto-round does not know, what their forward returns, in order.
            Without it, tuning would feed every block the first one's text states.
        block_inputs: Says, from configurations alone, how large the inputs of a component's blocks are, given
            the source, the component's name and complete sampling keys: count the tokens of image and text,
            multiply by the width of the blocks. Tuning keeps these inputs in memory (`quantkit.quantize.memory`);
            the runs of a family without it are not checked for memory.
    """

    blocks: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    block_outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block_inputs: Callable[[Pipeline, str, Sampling], BlockInputs] | None = None

    def prompt_kwargs(self, prompt: Prompt) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline call that say what to draw.

        Raises:
            RecipeError: If the family starts from a picture and the prompt has none, or it cannot be read.
        """
        if self.task != "i2v":
            return {"prompt": prompt.text}
        if prompt.image is None:
            raise RecipeError(
                f"{self.name} starts from a picture, and the prompt '{prompt.text}' has none; name one in a column "
                "'image' of the prompt file"
            )
        return {"prompt": prompt.text, "image": _read_image(prompt.image)}

    def build(self, component: Component) -> torch.nn.Module:
        """Build the component's architecture on the meta device, from its configuration alone.

        Raises:
            MissingExtraError: If diffusers is not installed.
            CheckpointError: If the configuration does not describe the class.
        """
        try:
            import diffusers
            import torch
            import transformers
        except ImportError as error:
            raise MissingExtraError(error.name or "diffusers", "quantize") from error
        libraries = {"diffusers": diffusers, "transformers": transformers}
        model_class: Any = getattr(libraries.get(component.library), component.class_name, None)
        if model_class is None:
            raise CheckpointError(
                f"{component.folder.parent / 'model_index.json'}: {component.name}: "
                f"{component.library}.{component.class_name} is no class of the installed diffusers or transformers"
            )
        config = {key: value for key, value in component.config.items() if key != "quantization_config"}
        try:
            with torch.device("meta"):
                model: torch.nn.Module = (
                    model_class.from_config(config)
                    if component.library == "diffusers"
                    else model_class(model_class.config_class.from_dict(config))
                )
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{component.folder / 'config.json'}: does not describe a {component.class_name}: {error}"
            ) from error
        return model

    def linears(self, component: Component, model: torch.nn.Module) -> Iterator[Linear]:
        """Yield every Linear of a component in the order of its modules."""
        import torch

        blocks = tuple(f"{name}." for name in self.blocks[component.name])
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                reason = None if name.startswith(blocks) else self._why_kept(name)
                yield Linear(name, module.in_features, module.out_features, reason)

    def _why_kept(self, name: str) -> str:
        known = (reason for start, reason in self.kept.items() if name.startswith(start))
        return next(known, "outside the blocks")

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load a reference pipeline for calibration, on the CPU.

        Args:
            folder: A local pipeline folder.
            dtype: Of the floating-point weights.
        """
        from quantkit_runtime import load_pipeline

        return load_pipeline(folder, device="cpu", dtype=dtype)


def _read_image(path: str) -> Any:
    """Return a picture as RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "quantize") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: is no picture: {error}") from error
