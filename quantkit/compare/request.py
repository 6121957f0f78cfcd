"""What a comparison is asked for, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.compare.shots import Shot
from quantkit.errors import RecipeError
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling, Task, Threshold


@dataclass(frozen=True)
class Request:
    """What to compare, and how.

    Attributes:
        reference: Folder of the model that is right by definition.
        candidate: Folder of the model that is judged.
        prompts: Each used with every seed; a text alone is a prompt without a picture.
        seeds: Seeds of the initial noise.
        reference_label: What people call the reference; empty takes the folder's name.
        candidate_label: Likewise.
        task: What the models are asked to do.
        sampling: Layers of sampling keys over the family's defaults, the later the stronger.
        any_size: Whether more pixels and frames are drawn than a server would by default.
        thresholds: Bounds per metric; empty takes the task's `DEFAULT_THRESHOLDS`.
        thresholds_source: Where the thresholds come from, for messages and the report.
        device: ``cpu``, ``cuda``, ``xpu`` ...; ``auto`` is the accelerator if there is one, else the CPU.
        dtype: One of `quantkit.execution.DTYPES`.
        compute: How packed layers compute: ``auto``, ``16bit`` or ``fp8``.
        backend: Kernel backend of packed layers; like ``compute``, for those of the two models that have some.
        compile: Compile the repeated blocks of both models.
        lpips_backbone: AlexNet weights for LPIPS; None looks in torch hub's cache.
        noise_floor: Whether the reference runs its first shot twice, which shows what differs without quantization.
        recipe: Path of the recipe that the values come from.
        recipe_sha256: Of that file.
        command: The command line, for the report.
    """

    reference: Path
    candidate: Path
    prompts: tuple[Prompt | str, ...]
    seeds: tuple[int, ...]
    reference_label: str = ""
    candidate_label: str = ""
    task: Task = "t2i"
    sampling: tuple[Sampling, ...] = ()
    any_size: bool = False
    thresholds: Mapping[str, Threshold] | None = None
    thresholds_source: str = ""
    device: str = "auto"
    dtype: str = "bfloat16"
    compute: str = "auto"
    backend: str = "auto"
    compile: bool = False
    lpips_backbone: Path | None = None
    noise_floor: bool = True
    recipe: str | None = None
    recipe_sha256: str | None = None
    command: tuple[str, ...] = ()

    def shots(self) -> list[Shot]:
        """Return every prompt with every seed, prompts outermost.

        Raises:
            RecipeError: If there is no prompt or seed, a text is empty, a seed comes twice, or a picture is missing
                or superfluous.
        """
        prompts = [Prompt(text=prompt) if isinstance(prompt, str) else prompt for prompt in self.prompts]
        if not prompts or not all(prompt.text.strip() for prompt in prompts):
            raise RecipeError(
                "prompts: give at least one, none of them empty (--prompt, --prompts or compare.prompts)"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise RecipeError("seeds: give at least one, each of them once")
        for index, prompt in enumerate(prompts):
            if self.task == "i2v" and prompt.image is None:
                raise RecipeError(
                    f"prompts: {index}: has no image, which i2v starts from; give --prompts FILE.jsonl with "
                    "'caption' and 'image' on every line"
                )
            if self.task in ("t2i", "t2v") and prompt.image is not None:
                raise RecipeError(f"prompts: {index}: has an image, which {self.task} takes none of")
            if prompt.image is not None and not Path(prompt.image).is_file():
                raise RecipeError(f"{prompt.image}: no such image (prompt {index})")
        # Greedy answers are the same with every seed.
        seeds = self.seeds[:1] if self.task == "chat" else self.seeds
        return [Shot(index, prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds]
