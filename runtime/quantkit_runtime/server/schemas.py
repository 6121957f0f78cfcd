"""Bodies of requests and answers. Unknown fields are errors; what depends on the model is checked in ``checks``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]  # what JSON readers hold exactly
Size = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$", description="WIDTHxHEIGHT in pixels")]
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Prompt = Annotated[str, Field(min_length=1, pattern=r"\S", description="Not empty")]


class Strict(BaseModel):
    """A body without unknown fields, and with the types that the OpenAPI names."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _take_whole_numbers(cls, body: object) -> object:
        """Take 20.0 for 20, as JSON Schema does; a field of numbers that need not be whole turns it back."""
        if not isinstance(body, dict):
            return body
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in body.items()
        }

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value: object) -> object:
        """Refuse what JSON can write but no answer could repeat: half a surrogate pair."""
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("holds half a surrogate pair")
        return value


def _describe_form(schema: dict[str, Any]) -> None:
    """Tell in a form's JSON schema that an empty field counts as left out; a form cannot say null."""
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            told = {key: field.pop(key) for key in field.keys() - {"title", "description", "default"}}
            values = [option for option in told.get("anyOf", [told]) if option != {"type": "null"}]
            field["anyOf"] = [*values, {"const": ""}]


class StrictForm(Strict):
    """A form: its numbers come as text."""

    model_config = ConfigDict(strict=False, arbitrary_types_allowed=True, json_schema_extra=_describe_form)


class Sampling(Strict):
    """What pictures and videos have in common; the model's defaults stand for what is left out."""

    model: str | None = Field(None, description="Name as in /v1/models; the first model without it")
    prompt: Prompt
    negative_prompt: str | None = None
    size: Size | None = None
    width: int | None = Field(None, ge=1, le=99_999, description="Instead of size, with height")
    height: int | None = Field(None, ge=1, le=99_999)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: Scale | None = None
    guidance_scale_2: Scale | None = Field(None, description="Of the second expert, e.g. of Wan2.2 A14B")
    true_cfg_scale: Scale | None = Field(None, description="Guidance of models whose own is distilled")
    max_sequence_length: int | None = Field(None, ge=1, le=4096, description="Text tokens")
    seed: Seed | None = Field(None, description="Drawn if left out")
    user: str | None = Field(None, max_length=256, description="Turns go round between users of one key")


class ImageOptions(Sampling):
    """What drawing and editing pictures have in common."""

    n: int = Field(1, ge=1, le=10, description="Pictures; picture i has seed + i")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp")


class ImageRequestBody(ImageOptions):
    """``POST /v1/images/generations``."""

    stream: bool = Field(False, description="Answer with server-sent events: progress, then each picture")


class ImageEditForm(ImageOptions, StrictForm):
    """``POST /v1/images/edits``."""

    image: UploadFile = Field(description="PNG, JPEG or WebP")
    strength: float | None = Field(None, gt=0, le=1)


class VideoForm(Sampling, StrictForm):
    """``POST /v1/videos`` and ``/v1/videos/sync``."""

    num_frames: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0, le=3600, allow_inf_nan=False, description="Instead of num_frames")
    fps: int | None = Field(None, ge=1, le=120)
    input_reference: UploadFile | None = Field(None, description="Picture to start from: PNG, JPEG or WebP")


class ImageData(BaseModel):
    """One picture."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """Pictures in the order of their seeds."""

    created: int
    data: list[ImageData]
    output_format: Literal["png", "jpeg", "webp"]
    size: str


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A video job."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="Percent of the steps")
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    seed: int
    error: VideoError | None = None


class VideoList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class VideoDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "quantkit"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of /health and /ready."""

    status: Literal["ok", "ready", "not_ready"]
    models: dict[str, str] = {}


class Version(BaseModel):
    """Versions of what runs here."""

    version: str
    torch: str
