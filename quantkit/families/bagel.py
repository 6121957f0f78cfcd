"""BAGEL: one decoder with an expert that understands text and images, and one that draws.

Quantized is the understanding expert. The drawing expert (names with ``_moe_gen``) runs dozens of times for one
image, which adds up its errors, and text does not calibrate it: it stays in 16 bit unless a recipe names it in
``layers.include``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder, read_json
from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.base import DiffusionFamily, Family, Linear, read_image
from quantkit.families.language import LanguageFamily, bare_model
from quantkit.families.serving import LANGUAGE_MODEL
from quantkit.families.sizes import Grid
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BagelFamily(LanguageFamily):
    """The family of BAGEL, whose class is `quantkit_runtime.models.bagel.Bagel`."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """It answers and draws, see `Family.tasks`."""
        return self.task, DRAWING.task

    def for_task(self, task: Task) -> Family:
        """Return what answers, or what draws, see `Family.for_task`."""
        return DRAWING if task == DRAWING.task else super().for_task(task)

    def how_to_guide(self) -> str:
        """Only pictures are guided, see `Family.how_to_guide`."""
        return f"its answers have none; of pictures (--output x.png), {DRAWING.how_to_guide()}"

    def build(self, component: Component) -> torch.nn.Module:
        """Build all but the VAE, see `quantkit.families.base.Family.build`."""
        import torch

        from quantkit_runtime.errors import CheckpointFormatError
        from quantkit_runtime.models.bagel import Bagel

        try:
            with torch.device("meta"):
                return Bagel.from_folder(component.folder)
        except CheckpointFormatError as error:
            raise CheckpointError(str(error)) from error

    def linears(self, component: Component, model: torch.nn.Module) -> Iterator[Linear]:
        """Yield every Linear; those of the drawing expert are optional."""
        for linear in super().linears(component, model):
            if linear.keep_reason is None and "_moe_gen" in linear.name:
                yield replace(linear, keep_reason="of the drawing expert", optional=True)
            else:
                yield linear

    def text_config(self, component: Component) -> Mapping[str, Any]:
        """Return that of the decoder, see `LanguageFamily.text_config`."""
        return read_json(component.folder / "llm_config.json")

    def load_processor(self, folder: Path) -> Any:
        """Load what joins texts and pictures, see `LanguageFamily.load_processor`."""
        from quantkit_runtime.errors import CheckpointFormatError
        from quantkit_runtime.models.bagel_processor import BagelProcessor

        try:
            return BagelProcessor(folder)
        except CheckpointFormatError as error:
            raise CheckpointError(str(error)) from error

    def ask(self, processor: Any, prompt: Prompt) -> Any:
        """Put the picture in front of the text, see `LanguageFamily.ask`."""
        if prompt.audio is not None:
            raise RecipeError(f"prompts: {self.name} cannot hear, and '{prompt.text}' comes with a sound")
        pictures = [] if prompt.image is None else [read_image(prompt.image)]
        return processor([*pictures, prompt.text])

    def text_model(self, model: Any) -> torch.nn.Module:
        """Return the decoder, see `LanguageFamily.text_model`."""
        # auto-round masks the last token; a causal decoder needs no mask for a text that is not padded.
        return bare_model(
            "language_model", model.language_model, lambda inputs: model.language_model(inputs["input_ids"])
        )

    def tokenize(self, processor: Any, sample: Prompt, max_tokens: int) -> dict[str, torch.Tensor]:
        """Put a text between BAGEL's marks of begin and end, see `LanguageFamily.tokenize`."""
        import torch

        begin, end, *_ = processor.marks
        tokens = processor.tokenizer.encode(
            sample.text, add_special_tokens=False, truncation=True, max_length=max_tokens - 2
        )
        return {"input_ids": torch.tensor([[begin, *tokens, end]])}


BAGEL = BagelFamily(
    name="bagel",
    task="chat",
    blocks={"model": ("language_model.model.layers",)},
    sampling=Sampling(max_new_tokens=128),
    vllm_omni=replace(LANGUAGE_MODEL, unvalidated="its quantized BAGEL has not been validated upstream"),
    foreign=("encoder.", "decoder."),  # the VAE, as its authors published it
)


def _grid(source: ModelFolder) -> Grid:
    """Return the sizes that BAGEL draws: of its VAE's pixels per latent, times the latents of a token.

    It knows as many places for tokens as its table has rows, whatever its configuration says.
    """
    pixels = (source.config.get("vae_config") or {}).get("downsample", 8)
    side = int(pixels) * int(source.config.get("latent_patch_size", 2))
    (component,) = source.components.values()
    places = component.tensors.get("latent_pos_embed.pos_embed")
    return Grid(side, most=None if places is None else side * math.isqrt(places.shape[0]))


DRAWING = DiffusionFamily(
    name=BAGEL.name,
    task="t2i",
    blocks={},  # `BAGEL` says what is quantized
    sampling=Sampling(height=1024, width=1024, num_inference_steps=49, guidance_scale=4.0),
    grid=_grid,
)
