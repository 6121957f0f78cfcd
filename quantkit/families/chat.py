"""What quantkit asks of a family whose models answer in text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.family import Family
from quantkit.recipe.prompts import Prompt


@dataclass(frozen=True)
class ChatFamily(Family):
    """A family of transformers models that write text.

    The defaults fit a plain causal language model; a family with other inputs or with a generator inside a larger
    model replaces the method that it needs to.
    """

    def open_processor(self, folder: Path) -> Any:
        """Return what turns prompts into inputs and tokens into text, from the model's own folder.

        Raises:
            CheckpointError: If the folder holds no tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}: holds no tokenizer that can be loaded: {reason}") from error

    def inputs(self, processor: Any, prompt: Prompt) -> Any:
        """Return the model's inputs for a prompt, as the processor's batch of one.

        Raises:
            RecipeError: If the prompt has a picture, which a model of text alone cannot see.
        """
        if prompt.image is not None:
            raise RecipeError(f"prompts: {self.name} reads text alone, and '{prompt.text}' comes with an image")
        if processor.chat_template is None:
            return processor(prompt.text, return_tensors="pt")
        return processor.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def generator(self, model: Any) -> Any:
        """Return the module that writes text: it has ``generate``, and its forward returns logits."""
        return model
