"""What a comparison found, as it is written to ``result.json`` and read back to plot or judge again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import CheckpointError
from quantkit.gate.verdict import Verdict
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling, Task

RESULT_FILE = "result.json"
REPORT_FILE = "report.html"
IMAGES_FOLDER = "images"
VIDEOS_FOLDER = "videos"
INPUTS_FOLDER = "inputs"


class Part(BaseModel):
    """Base of all parts: unknown keys and numbers that are not finite are errors, instances don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Timing(Part):
    """Median and 10 to 90 % range of a time; the unit is in the name of the field that holds it."""

    median: float
    p10: float
    p90: float
    count: int

    @property
    def steady(self) -> bool:
        """Whether the times agree within a factor of two; else a ratio of medians says little."""
        return self.p90 <= 2 * self.p10


class ModelSide(Part):
    """What was measured of one of the two models.

    Attributes:
        label: What people call it, e.g. ``demo``.
        path: Folder it was loaded from.
        manifest_sha256: Of its ``quantkit.json``; None if it has none.
        quantization: Component -> scheme in words, e.g. ``W4A16, group 128, symmetric``; empty for 16 bit.
        disk_bytes: Component -> bytes of its files.
        weight_bytes: Component -> bytes of its weights in memory, with what kernels keep beside packed ones.
        peak_memory_bytes: Highest memory above the level before loading; None if it cannot be measured here.
        peak_memory_note: How it was measured, or why it could not be.
        load_s: Seconds to load.
        step_ms: Milliseconds of a denoising step or token, the first of every output excluded; None if fewer than
            three others are left.
        output_s: Seconds of an image, video or answer, from the prompt on.
    """

    label: str
    path: str
    manifest_sha256: str | None
    quantization: dict[str, str]
    disk_bytes: dict[str, int]
    weight_bytes: dict[str, int]
    peak_memory_bytes: int | None
    peak_memory_note: str
    load_s: float
    step_ms: Timing | None
    output_s: Timing


class ImageOutput(Part):
    """Images of one prompt and seed, as PNG files relative to the result's folder.

    Attributes:
        kind: Tells it from the others.
        reference: The reference's image.
        candidate: The candidate's; None if it could not be scored.
        difference: The difference map; None as above.
    """

    kind: Literal["image"] = "image"
    reference: str
    candidate: str | None
    difference: str | None


class VideoOutput(Part):
    """Videos of one prompt and seed, as folders of PNG frames relative to the result's folder.

    Attributes:
        kind: Tells it from the others.
        reference: Folder of the reference's frames.
        candidate: Of the candidate's; None if it could not be scored.
        frames: Frames of each.
    """

    kind: Literal["video"] = "video"
    reference: str
    candidate: str | None
    frames: int


class AnswerOutput(Part):
    """Answers to one prompt, token by token.

    Attributes:
        kind: Tells it from the others.
        reference: Text of each token of the reference's answer; joined they are the answer.
        candidate: Likewise of the candidate, writing freely.
        agreement: For each token of the reference, whether both models find the same token most likely there.
        probability: For each token of the reference, the probability that the candidate gives it.
        first_difference: Index of the first token in which the two answers differ; None if none does.
    """

    kind: Literal["answer"] = "answer"
    reference: tuple[str, ...]
    candidate: tuple[str, ...]
    agreement: tuple[bool, ...]
    probability: tuple[float, ...]
    first_difference: int | None


Output = ImageOutput | VideoOutput | AnswerOutput


class Item(Part):
    """One prompt with one seed.

    Attributes:
        prompt: Index into the prompts.
        seed: Seed of the initial noise; of answers, which are greedy, of nothing.
        curves: Curve name -> values along its axis, as far as they are finite.
        metrics: Metric name -> value; empty if the item failed.
        failure: What the candidate produced that cannot be scored; None if all is well.
        output: What both models made.
    """

    prompt: int
    seed: int
    curves: dict[str, tuple[float, ...]]
    metrics: dict[str, float]
    failure: str | None
    output: Annotated[Output, Field(discriminator="kind")]


class Spread(Part):
    """Distribution of a curve over the items that reach each of its points; answers end at different lengths."""

    minimum: tuple[float, ...]
    p10: tuple[float, ...]
    median: tuple[float, ...]
    p90: tuple[float, ...]
    maximum: tuple[float, ...]
    count: tuple[int, ...]


class Summary(Part):
    """Mean over prompts of a metric and its 90 % interval."""

    value: float
    low: float
    high: float


class NoiseFloor(Part):
    """The reference run twice on its first item and scored like a candidate: what differs without quantization.

    Attributes:
        curves: Curve name -> values along its axis; all 0 distance where sampling is deterministic.
        metrics: Metric name -> value.
    """

    curves: dict[str, tuple[float, ...]]
    metrics: dict[str, float]


class Comparison(Part):
    """A whole comparison.

    Attributes:
        schema_version: Of this layout.
        created: UTC time, ISO 8601.
        command: The command line that made it, empty when called as a library.
        versions: Library -> version.
        device: Device string and name, e.g. ``cuda (NVIDIA H100)``.
        dtype: Of weights and activations, e.g. ``bfloat16``.
        compute: How packed layers computed: ``auto``, ``16bit`` or ``fp8``.
        backend: Kernel backend asked for.
        compiled: Whether the repeated blocks of both models were compiled.
        recipe: Path of the recipe; None without one.
        recipe_sha256: Of the recipe's bytes.
        family: Name of the model family.
        task: What the models were asked to do.
        sampling: How both were sampled, the family's defaults filled in; sizes are those of what came out.
        scheduler: Class of the scheduler; None if the task has none.
        timesteps: The scheduler's timestep of every step; empty if the task has none.
        prompts: What both models were asked; pictures are files relative to the result's folder.
        seeds: Seeds, each used with every prompt.
        reference: The reference model.
        candidate: The candidate model.
        items: One per prompt and seed, prompts outermost.
        curves: Curve name -> distribution over the items that could be scored.
        metrics: Metric name -> summary over prompts.
        unavailable: Metric name -> why it was not measured.
        difference_map: What the difference pictures show, ``FLIP`` or ``absolute error``.
        noise_floor: None if it was not asked for.
        thresholds_source: Where the thresholds come from.
        verdict: What the thresholds say.
    """

    schema_version: Literal[1]
    created: str
    command: tuple[str, ...]
    versions: dict[str, str]
    device: str
    dtype: str
    compute: str = "auto"
    backend: str
    compiled: bool = False
    recipe: str | None
    recipe_sha256: str | None
    family: str
    task: Task
    sampling: Sampling
    scheduler: str | None
    timesteps: tuple[float, ...]
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    reference: ModelSide
    candidate: ModelSide
    items: tuple[Item, ...]
    curves: dict[str, Spread]
    metrics: dict[str, Summary]
    unavailable: dict[str, str]
    difference_map: str
    noise_floor: NoiseFloor | None
    thresholds_source: str
    verdict: Verdict


def write_result(result: Comparison, folder: Path) -> Path:
    """Write ``result.json`` into a folder and return its path."""
    path = folder / RESULT_FILE
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read_result(path: Path) -> Comparison:
    """Read a result that `write_result` wrote.

    Args:
        path: The JSON file, or the folder that holds it as ``result.json``.

    Raises:
        CheckpointError: If the file cannot be read, or is no result of a schema version this quantkit reads.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    try:
        return Comparison.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "file"
        if key == "schema_version":
            raise CheckpointError(f"{file}: schema_version: this quantkit reads version 1 only") from error
        raise CheckpointError(
            f"{file}: {key}: {first['msg']}; this is no result of quantkit compare, or a damaged one"
        ) from error
