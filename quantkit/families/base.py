"""What quantkit asks of a model family.

A family that is a diffusers pipeline with Linears in repeated blocks needs no more than an instance of
`DiffusionFamily`; see ``flux.py``. One that is a single transformers model is a
`quantkit.families.language.LanguageFamily`.

Every tensor and layer name that passes between a family and the rest of quantkit is that of the checkpoint's files,
whatever the library calls the module that it loads them into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError, UnsupportedModelError
from quantkit.families.serving import LANGUAGE_MODEL, VllmOmni
from quantkit.families.sizes import Grid, check_grid
from quantkit.recipe.prompts import Prompt, read_prompts
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
class Family(ABC):
    """What is particular to one kind of model.

    Attributes:
        name: As recipes spell it.
        task: What its models do.
        blocks: For each component that can be quantized, the module lists that hold its repeated blocks. Linears
            inside are quantized, those outside (embedders, final norm and projection) stay in 16 bit, as in
            the published checkpoints.
        sampling: Defaults of every sampling key that the models take. A key that is None here is not a parameter
            of the family.
        aliases: Other names of blocks: libraries that rename modules while loading look for these in a
            ``quantization_config``.
        foreign: How the names of tensors begin that are of another network, although an index joins them to a
            component's own. They are taken as they are.
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
        guidance: The sampling key that, above 1, makes each step run the model twice; None if none does.
        several_devices: Whether auto-round spreads the layers of a block over several devices while it tunes it.
        vllm_omni: How vLLM-Omni names and shards the Linears that are quantized; None if that is not known.
    """

    name: str
    task: Task
    blocks: Mapping[str, tuple[str, ...]]
    sampling: Sampling
    aliases: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    block_outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block_inputs: Callable[[ModelFolder, str, Sampling], BlockInputs] | None = None
    guidance: str | None = None
    several_devices: bool = False
    vllm_omni: VllmOmni | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All that its models do; most do but one thing."""
        return (self.task,)

    def for_task(self, task: Task) -> Family:
        """Return the family as which its models do a task.

        Raises:
            UnsupportedModelError: They do not do it.
        """
        if task != self.task:
            raise UnsupportedModelError(f"task {task}: the family {self.name} does {' and '.join(self.tasks)}")
        return self

    def engine_of(self, component: Component) -> VllmOmni | None:
        """Return how vLLM-Omni names and shards the Linears of a component; None if that is not known."""
        return self.vllm_omni if component.library == "diffusers" else LANGUAGE_MODEL

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

    def check_sizes(self, model: ModelFolder, sampling: Sampling, named: Callable[[str], str]) -> None:
        """Refuse sizes that a model cannot draw, which its pipeline would round; by default nothing.

        Args:
            model: Its folder.
            sampling: Complete.
            named: Returns how messages call a sampling key.

        Raises:
            RecipeError: With the nearest sizes that work.
        """
        del model, sampling, named

    def count_block_inputs(
        self, source: ModelFolder, component: str, sampling: Sampling, max_tokens: int
    ) -> BlockInputs | None:
        """Return how large the inputs of a component's blocks are, from configurations alone.

        Args:
            source: The 16-bit model.
            component: Name of the component.
            sampling: Complete, of the calibration.
            max_tokens: Of a sample that is text.

        Returns:
            None if the family cannot tell.
        """
        del max_tokens
        return None if self.block_inputs is None else self.block_inputs(source, component, sampling)

    def is_guided(self, sampling: Sampling) -> bool:
        """Whether these sampling keys, complete, make each step run the model twice."""
        return self.guidance is not None and float(sampling.given().get(self.guidance, 0)) > 1

    def how_to_guide(self) -> str:
        """Return what a user can do to turn guidance on."""
        if self.guidance is None:
            return f"{self.name} has none"
        return f"{self.name} is guided with --{self.guidance.replace('_', '-')} above 1"

    @abstractmethod
    def build(self, component: Component) -> torch.nn.Module:
        """Build the component's architecture on the meta device, from its configuration alone.

        Raises:
            MissingExtraError: If the library that has the class is not installed.
            CheckpointError: If the configuration does not describe the class.
        """

    def tensor_shapes(self, component: Component, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that a 16-bit checkpoint holds, of tied ones the first.

        Args:
            component: What is checked: releases of a library differ in what they store.
            model: From `build`.
        """
        del component
        first = {name for name, _ in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}

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

    def check_calibration(self, folder: Path, samples: Sequence[Any], max_tokens: int) -> None:
        """Refuse what the model could not be fed with, before any time is spent; by default nothing.

        Args:
            folder: Of the model.
            samples: From `read_calibration`.
            max_tokens: Of a sample.

        Raises:
            CheckpointError: If the model lacks what it takes to read the samples.
            RecipeError: If a sample does not fit.
        """
        del folder, samples, max_tokens

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load a reference model for calibration, on the CPU.

        Args:
            folder: A local model folder.
            dtype: Of the floating-point weights.
        """


@dataclass(frozen=True)
class DiffusionFamily(Family):
    """A family whose models are diffusers pipelines.

    Attributes:
        frames_per_second: At which its videos play.
        grid: Says, from configurations alone, which sizes a model draws; without it, they are not checked.
    """

    guidance: str | None = "guidance_scale"
    frames_per_second: int = 16
    grid: Callable[[ModelFolder], Grid] | None = None

    def check_sizes(self, model: ModelFolder, sampling: Sampling, named: Callable[[str], str]) -> None:
        """Hold sizes against the family's grid, see `Family.check_sizes`."""
        if self.grid is not None:
            check_grid(self.grid(model), self.name, sampling, named)

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
        return {"prompt": prompt.text, "image": read_image(prompt.image)}

    def check_calibration(self, folder: Path, samples: Sequence[Prompt], max_tokens: int) -> None:
        """Read the pictures that prompts start from, see `Family.check_calibration`."""
        del folder, max_tokens
        for prompt in samples:
            self.prompt_kwargs(prompt)

    def build(self, component: Component) -> torch.nn.Module:
        """Build a class of diffusers, see `Family.build`."""
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
        """Yield every Linear; those outside the blocks stay in 16 bit."""
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
        """Load a pipeline, see `Family.load`."""
        from quantkit_runtime import load_pipeline

        return load_pipeline(folder, device="cpu", dtype=dtype)


def read_image(path: str) -> Any:
    """Return a picture as RGB.

    Raises:
        RecipeError: If the file cannot be read as one.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "quantize") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: is no picture: {error}") from error
