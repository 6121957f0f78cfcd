"""Families whose models are one transformers model: its language model is quantized, all around it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder, read_tensors
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError
from quantkit.families.base import BlockInputs, Family, Linear
from quantkit.families.serving import LANGUAGE_MODEL, VllmOmni
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling

if TYPE_CHECKING:
    import torch

ROUTERS = (".mlp.gate", ".mlp.shared_expert_gate")
"""How the names of Linears end that send tokens to experts; an error there changes who computes."""


@dataclass(frozen=True)
class LanguageFamily(Family):
    """A family whose models are a single transformers model.

    Linears inside the blocks are quantized, except routers. The experts of a layer are Linears of their own,
    whatever transformers fuses them into. Class and names of modules are the installed transformers' own, see
    `quantkit_runtime.names`.

    Attributes:
        config_sections: Sections of ``config.json`` where engines that run the model in stages look for the
            ``quantization_config``, beside the top level, e.g. ``("thinker_config.text_config",)``.
    """

    several_devices: bool = True
    vllm_omni: VllmOmni | None = LANGUAGE_MODEL
    config_sections: tuple[str, ...] = ()

    def engine_of(self, component: Component) -> VllmOmni | None:
        """Return the names of the language model's Linears, see `Family.engine_of`."""
        del component  # there is but one
        return self.vllm_omni

    def build(self, component: Component) -> torch.nn.Module:
        """Build a class of transformers, see `Family.build`."""
        import torch

        from quantkit_runtime.architecture import build_transformers, class_of
        from quantkit_runtime.errors import CheckpointFormatError, MissingDependencyError

        path = component.folder / "config.json"
        try:
            model_class = class_of(component.config, path)
            with torch.device("meta"):
                return build_transformers(model_class, component.config, path, torch.bfloat16)
        except CheckpointFormatError as error:
            raise CheckpointError(str(error)) from error
        except MissingDependencyError as error:
            raise MissingExtraError("transformers", "quantize") from error

    def tensor_shapes(self, component: Component, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint, each expert's apart.

        Buffers that models compute by now may still be in files of earlier releases.
        """
        from quantkit_runtime.names import CheckpointNames, checkpoint_tensors

        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(model).items()}
        names, buffers = CheckpointNames(model), dict(model.named_buffers())
        for name in read_tensors(component.folder).keys() - shapes.keys():
            if (buffer := buffers.get(names.place(name).name)) is not None:
                shapes[name] = tuple(buffer.shape)
        return shapes

    def linears(self, component: Component, model: torch.nn.Module) -> Iterator[Linear]:
        """Yield every Linear, experts and routers among them."""
        import torch

        from quantkit_runtime.names import CheckpointNames

        blocks = tuple(f"{name}." for name in self.blocks[component.name])
        names = CheckpointNames(model)
        modules = dict(model.named_modules())
        for tensor, shape in self.tensor_shapes(component, model).items():
            if len(shape) != 2 or not tensor.endswith(".weight"):
                continue
            name = tensor.removesuffix(".weight")
            place = names.place(tensor)
            routes = name.endswith(ROUTERS)
            is_linear = isinstance(modules.get(place.name.removesuffix(".weight")), torch.nn.Linear)
            if not (is_linear or routes or place.pattern is not None):  # an embedding
                continue
            reason = None
            if not name.startswith(blocks):
                reason = "outside the language model's blocks"
            elif routes:
                reason = "a router"
            yield Linear(name, shape[1], shape[0], reason)

    def quantized_config(self, component: Component, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Put the ``quantization_config`` at the top level and into every one of ``config_sections``."""
        config = super().quantized_config(component, quantization)
        for section in self.config_sections:
            parent = config
            for key in section.split("."):
                parent[key] = dict(parent.get(key) or {})
                parent = parent[key]
            parent["quantization_config"] = dict(quantization)
        return config

    def text_config(self, component: Component) -> Mapping[str, Any]:
        """Return the configuration of the language model, by default the model's."""
        return component.config

    def count_block_inputs(
        self, source: ModelFolder, component: str, sampling: Sampling, max_tokens: int
    ) -> BlockInputs | None:
        """Count as many tokens as a sample may have, see `Family.count_block_inputs`."""
        del sampling
        config = self.text_config(source.components[component])
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if not width or not heads:
            return None
        rotary_embedding = 2 * (config.get("head_dim") or width // heads)  # cosine and sine
        return BlockInputs(
            calls=1, passed_nbytes=2 * max_tokens * width, shared_nbytes=2 * max_tokens * rotary_embedding
        )

    def text_model(self, model: Any) -> torch.nn.Module:
        """Return the part of a loaded model that reads text, its modules named as in the whole; by default all."""
        whole: torch.nn.Module = model
        return whole

    def check_calibration(self, folder: Path, samples: Sequence[Any], max_tokens: int) -> None:
        """Try to turn every sample into the model's inputs, see `Family.check_calibration`."""
        processor = self.load_processor(folder) if samples else None
        for sample in samples:
            self.tokenize(processor, sample, max_tokens)

    def module_names(self, model: torch.nn.Module, layers: Iterable[str]) -> dict[str, str]:
        """Return what the modules of a loaded model are called that the checkpoint names so; blocks as well."""
        from quantkit_runtime.names import CheckpointNames

        names = CheckpointNames(model)
        return {layer: names.module(layer) for layer in layers}

    def load_processor(self, folder: Path) -> Any:
        """Load what turns prompts into inputs and tokens into text, by default the tokenizer.

        Raises:
            CheckpointError: If the folder holds none that can be loaded.
        """
        from transformers import AutoTokenizer

        from quantkit_runtime.errors import CheckpointFormatError
        from quantkit_runtime.generation.text import load_processor

        try:
            return load_processor(AutoTokenizer, folder)
        except CheckpointFormatError as error:
            raise CheckpointError(str(error)) from error

    def tokenize(self, processor: Any, sample: Any, max_tokens: int) -> dict[str, torch.Tensor]:
        """Return the model's inputs for one of `read_calibration`, by default a prompt, as a batch of one."""
        return dict(processor(sample.text, truncation=True, max_length=max_tokens, return_tensors="pt"))

    def ask(self, processor: Any, prompt: Prompt) -> Any:
        """Return the model's inputs for a prompt that it is to answer, as the processor's batch of one.

        Raises:
            RecipeError: If the prompt has a picture or a sound, which a model of text alone cannot take in.
        """
        if prompt.image is not None or prompt.audio is not None:
            kind = "an image" if prompt.image is not None else "a sound"
            raise RecipeError(f"prompts: {self.name} reads text alone, and '{prompt.text}' comes with {kind}")
        if processor.chat_template is None:
            return processor(prompt.text, return_tensors="pt")
        return processor.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model, see `Family.load`."""
        from quantkit_runtime import load_model

        return load_model(folder, device="cpu", dtype=dtype)


def bare_model(name: str, module: torch.nn.Module, read: Callable[[dict[str, Any]], Any]) -> torch.nn.Module:
    """Return a part of a model under its name in the whole, with what auto-round asks of a model.

    It has no model_type: at those that it knows, auto-round follows rules of its own instead of the plan.

    Args:
        name: Of the part.
        module: The part.
        read: Calls it with the inputs of `LanguageFamily.tokenize`.
    """
    import torch
    from transformers import PretrainedConfig

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, module)
            self.config = PretrainedConfig()
            self.name_or_path = ""

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

        @property
        def dtype(self) -> torch.dtype:
            return next(self.parameters()).dtype

        def forward(self, **inputs: Any) -> Any:
            return read(inputs)

    return Bare()
