"""The recipe: everything that decides how a model is quantized, compared and served, as strict models.

Version 1. Every key a user can write is a field here with its meaning, unit and default; keys that are
not here are errors. Fields that a model family knows better (sampling, what to quantize) default to None
and are filled in by `quantkit.families`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Task = Literal["t2i", "t2v", "i2v", "chat"]
Bits = Literal[2, 3, 4, 8]

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]


def _check_group_size(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError("must be -1 (one group per output channel) or positive")
    return value


def _check_shard_size(value: str) -> str:
    parse_size(value)
    return value


def parse_size(text: str) -> int:
    """Turn a size such as ``5GB``, ``512MiB`` or ``1000`` into bytes.

    Raises:
        ValueError: If the text is no positive size.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is no size; write for example 5GB or 512MiB")
    return math.floor(float(match[1]) * units[match[2].upper()])


GroupSize = Annotated[int, AfterValidator(_check_group_size)]
ShardSize = Annotated[str, AfterValidator(_check_shard_size)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, instances don't change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """Which model to quantize."""

    id: Text
    """Hub id, path of a local folder, or ``demo`` for the embedded model."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None takes the default branch."""
    family: str | None = None
    """Name of the model family; None detects it from the model's own configuration."""
    task: Task = "t2i"


class LayerScheme(Section):
    """How a Linear's weight is stored; in an override, None inherits from the recipe's scheme."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    """Input channels that share one scale; -1 is one group per output channel."""
    sym: bool | None = None


class Scheme(Section):
    """How weights are quantized. ``iters: 0`` rounds to nearest (RTN); more tunes with signed gradients."""

    bits: Bits = 4
    group_size: GroupSize = 128
    sym: bool = True
    data_type: Literal["int"] = "int"
    iters: Annotated[int, Field(ge=0, le=10_000)] = 200
    """Steps of signed gradient descent per block; 0 rounds to nearest without calibration."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the rounding offsets; None is 1 / iters."""
    minmax_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the clipping range; None is the same as lr."""
    batch_size: PositiveInt = 8
    """Calibration samples per tuning step."""
    nsamples: PositiveInt = 128
    """Calibration samples in all."""
    seqlen: PositiveInt = 2048
    """Tokens per calibration sample (text models only)."""
    seed: Seed = 42

    @property
    def tuned(self) -> bool:
        """Whether signed gradient descent runs."""
        return self.iters > 0


class Override(LayerScheme):
    """Another scheme for the layers that a pattern names."""

    match: Text
    """Exact layer name or glob, e.g. ``transformer_blocks.*.attn.to_q``, or ``transformer_2.blocks.*``."""
    keep: bool = False
    """True keeps these layers in 16 bit."""

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        given = self.bits is not None or self.group_size is not None or self.sym is not None
        if given == self.keep:
            raise ValueError("give either keep: true or at least one of bits, group_size, sym")
        return self


class Layers(Section):
    """Which Linear layers are quantized; by default those of the family.

    A pattern is an exact name or a glob. It is tried on a layer's name within its component, and on that name with
    the component's before it: ``blocks.*`` means the blocks of every component, ``transformer_2.blocks.*`` of one.
    """

    components: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Components that are quantized, e.g. ``[transformer]``. None takes the family's choice."""
    include: tuple[Text, ...] | None = None
    """Patterns; only Linears that match are quantized. None takes the family's choice."""
    exclude: tuple[Text, ...] = ()
    """Patterns of Linears that stay in 16 bit."""
    overrides: tuple[Override, ...] = ()
    """Per-layer schemes; the last match wins."""


class Sampling(Section):
    """How the model is sampled; None means the family's default for the key."""

    height: PositiveInt | None = None
    """Pixels."""
    width: PositiveInt | None = None
    """Pixels."""
    num_frames: PositiveInt | None = None
    num_inference_steps: PositiveInt | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    guidance_scale_2: Annotated[float, Field(ge=0)] | None = None
    """Guidance of the second expert, for families that have two."""
    true_cfg_scale: Annotated[float, Field(ge=0)] | None = None
    """Classifier-free guidance with a negative prompt; above 1 each step runs the model twice."""
    negative_prompt: str | None = None
    max_sequence_length: PositiveInt | None = None
    """Text tokens."""

    def over(self, base: Sampling) -> Sampling:
        """Return the base with every key that is given here replaced."""
        keys = Sampling.model_fields
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return Sampling(**{key: given.get(key, getattr(base, key)) for key in keys})

    def given(self) -> dict[str, int | float | str]:
        """Return the keys that are not None."""
        return {key: value for key in Sampling.model_fields if (value := getattr(self, key)) is not None}


class Calibration(Sampling):
    """What the tuning sees; sampling keys given here replace those of ``sampling``."""

    prompts: Text | None = None
    """File of prompts: .txt (one a line), .tsv or .csv with a column ``caption``, .jsonl with ``caption``.

    For image to video also ``image``, the path of a picture from the file's folder."""
    dataset: Text | None = None
    """Name of a data set that auto-round knows (downloaded), e.g. ``coco2014``; instead of prompts."""
    seed: Seed = 42
    """Seed of the noise the calibration images start from."""

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if self.prompts is not None and self.dataset is not None:
            raise ValueError("give prompts or dataset, not both")
        return self


class Export(Section):
    """How the checkpoint is written."""

    format: Literal["auto_round"] = "auto_round"
    """auto-round's own layout with packing ``auto_round:auto_gptq``."""
    max_shard_size: ShardSize = "5GB"


class Threshold(Section):
    """Bounds of one metric; at least one of both."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Threshold:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


class Compare(Sampling):
    """How reference and candidate are compared; sampling keys given here replace those of ``sampling``."""

    prompts: Text | None = None
    """File of prompts, as in calibration."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1)
    thresholds: dict[str, Threshold] = Field(default_factory=dict)
    """Bounds per metric name; they decide the verdict."""


class Eval(Section):
    """Which benchmark suites judge the candidate."""

    suites: tuple[Text, ...] = ()


class Serve(Sampling):
    """Defaults of a request that names no value; sampling keys given here replace those of ``sampling``."""


class Recipe(Section):
    """One recipe, version 1."""

    version: Literal[1]
    model: Model
    scheme: Scheme = Scheme()
    layers: Layers = Layers()
    sampling: Sampling = Sampling()
    """How the model is sampled wherever calibration, compare and serve say nothing else."""
    calibration: Calibration = Calibration()
    export: Export = Export()
    compare: Compare = Compare()
    eval: Eval = Eval()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _tuning_has_prompts(self) -> Recipe:
        if self.scheme.tuned and self.calibration.prompts is None and self.calibration.dataset is None:
            raise ValueError("tuning (scheme.iters above 0) needs calibration.prompts or calibration.dataset")
        return self
