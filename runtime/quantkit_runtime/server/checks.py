"""Turns bodies into requests of the engine, within what model and limits allow, with defaults filled in."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantkit_runtime.server.chat_schemas import ChatBody
from quantkit_runtime.server.errors import bad_request
from quantkit_runtime.server.models.diffusion import OPTIONS
from quantkit_runtime.server.protocol import ImageRequest, ModelInfo, VideoRequest
from quantkit_runtime.server.schemas import ImageEditForm, Strict, VideoForm
from quantkit_runtime.server.settings import SettingsError

if TYPE_CHECKING:
    import numpy as np

    from quantkit_runtime.server.deployment import Deployment
    from quantkit_runtime.server.schemas import ImageOptions, Sampling
    from quantkit_runtime.server.settings import Limits, Settings

_SEEDS = 2**53
_DEFAULTS: dict[type[Strict], tuple[str, ...]] = {
    VideoForm: ("negative_prompt", "width", "height", "num_frames", "fps", *OPTIONS[:-1]),
    ImageEditForm: ("strength",),
    ChatBody: (
        *("max_tokens", "temperature", "top_p", "top_k"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    ),
}
"""Fields whose defaults can be set, by a body that has them."""


def check_defaults(settings: Settings) -> None:
    """Check the values that stand for what requests leave out as if a request gave them.

    Raises:
        SettingsError: One is of no such field, or no request could give it.
    """
    fields = {name: schema for schema, names in _DEFAULTS.items() for name in names}
    for spec in settings.models.values():
        for name, value in spec.defaults.items():
            schema = fields.get(name)
            if schema is None:
                raise SettingsError(f"--default {name}: cannot be set for all requests; use {', '.join(fields)}")
            try:
                schema.__pydantic_validator__.validate_assignment(schema.model_construct(), name, value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise SettingsError(f"--default {name}={value}: {reason[0].lower()}{reason[1:]}") from error


def image_request(
    body: ImageOptions, deployment: Deployment, limits: Limits, request_id: str, image: np.ndarray | None = None
) -> ImageRequest:
    """Return pictures to draw.

    Raises:
        ApiError: A field is not what model or limits allow.
    """
    info = deployment.info
    _check_sampling(body, info, limits)
    width, height = _size(body, deployment, limits)
    seed = body.seed if body.seed is not None else secrets.randbits(31)
    return ImageRequest(
        id=request_id,
        prompt=body.prompt,
        seeds=tuple((seed + index) % _SEEDS for index in range(body.n)),
        width=width,
        height=height,
        options=_options(body, deployment, limits),
        negative_prompt=body.negative_prompt
        if body.negative_prompt is not None
        else deployment.default("negative_prompt"),
        image=image,
    )


def video_request(
    body: VideoForm, deployment: Deployment, limits: Limits, request_id: str, image: np.ndarray | None
) -> VideoRequest:
    """Return a video to draw.

    Raises:
        ApiError: A field is not what model or limits allow.
    """
    info = deployment.info
    _check_sampling(body, info, limits)
    if info.needs_image and image is None:
        raise bad_request(
            f"input_reference: {deployment.name} starts from a picture; send one", "input_reference",
            "missing_required_parameter",
        )  # fmt: skip
    if image is not None and not info.draws_from_image:
        raise bad_request(f"input_reference: {deployment.name} takes no picture", "input_reference")
    width, height = _size(body, deployment, limits)
    fps = body.fps or int(deployment.default("fps"))
    if body.num_frames is not None and body.seconds is not None:
        raise bad_request("seconds: give either seconds or num_frames", "seconds")
    frames = body.num_frames or int(deployment.default("num_frames"))
    if body.seconds is not None:
        frames = max(round(body.seconds * fps), 1)
    if frames > limits.max_frames:
        param = "num_frames" if body.seconds is None else "seconds"
        raise bad_request(f"{param}: {frames} frames; at most {limits.max_frames}", param)
    return VideoRequest(
        id=request_id,
        prompt=body.prompt,
        seed=body.seed if body.seed is not None else secrets.randbits(31),
        width=width,
        height=height,
        num_frames=frames,
        fps=fps,
        options=_options(body, deployment, limits),
        negative_prompt=body.negative_prompt
        if body.negative_prompt is not None
        else deployment.default("negative_prompt"),
        image=image,
    )


def _check_sampling(body: Sampling, info: ModelInfo, limits: Limits) -> None:
    for name in (*OPTIONS, "negative_prompt"):
        if getattr(body, name, None) is not None and name not in info.parameters:
            raise bad_request(f"{name}: {info.description} does not take it", name, "unsupported_parameter")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > limits.max_prompt_chars:
            raise bad_request(f"{name}: at most {limits.max_prompt_chars} characters", name)
    steps = body.num_inference_steps
    if steps is not None and steps > limits.max_steps:
        raise bad_request(f"num_inference_steps: at most {limits.max_steps}, not {steps}", "num_inference_steps")


def _options(body: Sampling, deployment: Deployment, limits: Limits) -> dict[str, Any]:
    options = {}
    for name in OPTIONS:
        value = getattr(body, name, None)
        value = deployment.default(name) if value is None else value
        if value is not None and name in deployment.info.parameters:
            options[name] = value
    if "num_inference_steps" in options:  # the model's own number may be above the limit
        options["num_inference_steps"] = min(options["num_inference_steps"], limits.max_steps)
    return options


def _size(body: Sampling, deployment: Deployment, limits: Limits) -> tuple[int, int]:
    if body.size is not None and (body.width is not None or body.height is not None):
        raise bad_request("size: give either size or width and height", "size")
    if (body.width is None) != (body.height is None):
        missing = "height" if body.height is None else "width"
        raise bad_request(f"{missing}: goes with {'width' if missing == 'height' else 'height'}", missing)
    param = "size"
    if body.size is not None:
        width, height = (int(part) for part in body.size.split("x"))
    elif body.width is not None and body.height is not None:
        width, height = body.width, body.height
        param = "width"
    else:
        width, height = int(deployment.default("width")), int(deployment.default("height"))
    multiple = deployment.info.size_multiple
    if width % multiple or height % multiple:
        fits = "x".join(str(max(round(side / multiple), 1) * multiple) for side in (width, height))
        raise bad_request(
            f"{param}: {width}x{height}; both must be multiples of {multiple}, the nearest is {fits}", param
        )
    if width * height > limits.max_pixels:
        raise bad_request(f"{param}: {width}x{height}; at most {limits.max_pixels} pixels in all", param)
    return width, height
