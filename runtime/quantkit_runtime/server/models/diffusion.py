"""Any diffusers pipeline that draws pictures or videos.

What a pipeline takes is read from the signature of its call; only how its output is turned into frames is common.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantkit_runtime.errors import CheckpointFormatError, ParallelError
from quantkit_runtime.server.models.base import BatchModel, OnStep, RequestRefusedError, place_of
from quantkit_runtime.server.protocol import Frames, ImageRequest, Kind, ModelInfo, ModelSpec, Request, VideoRequest

OPTIONS = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "max_sequence_length",
    "strength",
)
"""Arguments of pipelines that a request may set, by the same name."""

_MAX_BATCH = 4
_WARM_UP_PIXELS = 256
_WARM_UP_FRAMES = 5


def load(spec: ModelSpec) -> DiffusionModel:
    """Load a pipeline.

    Raises:
        QuantkitRuntimeError: It cannot be loaded, or is no pipeline of pictures or videos.
    """
    pipeline, call = load_parallel(spec)
    return DiffusionModel(pipeline, call, spec.max_batch, warms_up_fully=spec.compile or spec.cuda_graphs)


def load_parallel(spec: ModelSpec) -> tuple[Any, Any]:
    """Return a pipeline and what calls it, on this rank of as many as the spec says.

    Raises:
        QuantkitRuntimeError: It cannot be loaded.
    """
    import torch

    from quantkit_runtime.load import load_pipeline

    device, mesh = place_of(spec)
    pipeline = load_pipeline(
        spec.path,
        device=device,
        dtype=getattr(torch, spec.dtype),
        compute=spec.compute,
        backend=spec.backend,
        compile=spec.compile,
        cuda_graphs=spec.cuda_graphs,
        tensor_parallel=None if mesh is None else mesh["tensor"],
    )
    pipeline.set_progress_bar_config(disable=True)
    if mesh is None:
        return pipeline, pipeline
    from quantkit_runtime.parallel import parallel_call

    return pipeline, parallel_call(pipeline, mesh)


class DiffusionModel(BatchModel):
    """A pipeline, called with the fields of requests.

    Args:
        pipeline: The pipeline itself.
        call: What runs it: the pipeline, or `CfgParallel` of it.
        max_batch: Pictures in one call, if it can draw several; None is a default.
        warms_up_fully: Warm up with the size that requests have by default, since it is compiled or recorded for
            a size, instead of a small one.

    Raises:
        CheckpointFormatError: It takes no prompt, or reports no steps.
    """

    def __init__(
        self, pipeline: Any, call: Any, max_batch: int | None = None, *, warms_up_fully: bool = False
    ) -> None:
        self.pipeline = pipeline
        self._call = call
        self._warms_up_fully = warms_up_fully
        self._takes = inspect.signature(type(pipeline).__call__).parameters
        for needed in ("prompt", "callback_on_step_end", "generator", "height", "width"):
            if needed not in self._takes:
                raise CheckpointFormatError(
                    f"{type(pipeline).__name__}: its call takes no {needed}, so it cannot be served"
                )
        self.info = self._describe(max_batch or _MAX_BATCH)

    def warm_up(self) -> None:
        """Draw a picture or video in two steps, with guidance where there is a negative prompt."""
        info = self.info
        side = {name: info.defaults[name] for name in ("width", "height")}
        frames = info.defaults.get("num_frames", _WARM_UP_FRAMES)
        if not self._warms_up_fully:
            side = {name: _warm_up_size(pixels, info.size_multiple) for name, pixels in side.items()}
            frames = _WARM_UP_FRAMES
        options = {name: info.defaults[name] for name in OPTIONS if name in info.defaults}
        options["num_inference_steps"] = 2
        # Guidance, so that ranks that share it have something to share.
        if "true_cfg_scale" in info.parameters:
            options["true_cfg_scale"] = 2.0
        negative = "" if "negative_prompt" in info.parameters else None
        image = np.zeros((side["height"], side["width"], 3), np.uint8) if info.needs_image else None
        request: Request
        if "video" in info.kinds:
            request = VideoRequest("warm-up", "", 0, **side, num_frames=frames, fps=1, options=options,
                                   negative_prompt=negative, image=image)  # fmt: skip
        else:
            request = ImageRequest("warm-up", "", (0,), **side, options=options, negative_prompt=negative,
                                   image=image)  # fmt: skip
        try:
            self.run([request], lambda _step, _steps: None)
        except RequestRefusedError:  # too small for this pipeline
            return

    def run(self, requests: Sequence[Request], on_step: OnStep) -> list[Frames]:
        """Draw; pictures of several requests in calls of at most ``max_batch``."""
        first = requests[0]
        if isinstance(first, VideoRequest):
            arguments = {"num_frames": first.num_frames, "prompt": first.prompt}
            if first.negative_prompt is not None:
                arguments["negative_prompt"] = first.negative_prompt
            return [Frames(self._draw(first, arguments, [first.seed], on_step, (0, 1))[0])]
        pictures = [request for request in requests if isinstance(request, ImageRequest)]
        items = [(request, seed) for request in pictures for seed in request.seeds]
        size = self.info.max_batch if pictures[0].image is None else 1
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        drawn: list[np.ndarray] = []
        for index, chunk in enumerate(chunks):
            arguments = {"prompt": [request.prompt for request, _ in chunk]}
            if chunk[0][0].negative_prompt is not None:
                arguments["negative_prompt"] = [request.negative_prompt for request, _ in chunk]
            seeds = [seed for _, seed in chunk]
            drawn += self._draw(chunk[0][0], arguments, seeds, on_step, (index, len(chunks)))
        images = iter(drawn)
        return [Frames(np.stack([next(images) for _ in request.seeds])) for request in pictures]

    def _draw(
        self,
        request: ImageRequest | VideoRequest,
        arguments: dict[str, Any],
        seeds: list[int],
        on_step: OnStep,
        part: tuple[int, int],
    ) -> list[np.ndarray]:
        """Call the pipeline once; returns uint8 (height, width, 3) for each picture, or one (frames, ...)."""
        import torch

        def after_step(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            steps = int(pipeline.num_timesteps)
            on_step(part[0] * steps + step + 1, part[1] * steps)
            return tensors

        arguments |= request.options
        arguments |= {"height": request.height, "width": request.width}
        if request.image is not None:
            from PIL import Image

            picture = Image.fromarray(request.image)
            # GLM-Image takes nothing but a list, which other editing pipelines take as well.
            arguments["image"] = [picture] if isinstance(request, ImageRequest) else picture
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            with torch.inference_mode():
                output = self._call(
                    **arguments,
                    generator=generators if len(generators) > 1 else generators[0],
                    callback_on_step_end=after_step,
                    output_type="np",
                )
        except ValueError as error:  # the checks that begin every call in diffusers
            raise RequestRefusedError(f"{type(self.pipeline).__name__} refuses it: {error}") from error
        except ParallelError as error:
            if "guidance is off" not in str(error):
                raise
            raise RequestRefusedError(str(error), "guidance_scale") from error
        frames = output.frames[0] if hasattr(output, "frames") else output.images
        if not np.isfinite(frames).all():
            raise ArithmeticError("the model's output is not finite")
        pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
        return [pixels] if hasattr(output, "frames") else list(pixels)

    def _describe(self, max_batch: int) -> ModelInfo:
        pipeline, takes = self.pipeline, self._takes
        is_video = "num_frames" in takes
        takes_image = "image" in takes
        defaults = {
            name: takes[name].default
            for name in (*OPTIONS, "height", "width", "num_frames")
            if name in takes and isinstance(takes[name].default, (int, float))
        }
        most = int(getattr(pipeline, "max_prompts", max_batch))
        factor = int(getattr(pipeline, "vae_scale_factor_spatial", 0) or getattr(pipeline, "vae_scale_factor", 8))
        side = int(getattr(pipeline, "default_sample_size", 64)) * factor
        for name in ("height", "width"):
            defaults.setdefault(name, side)
        if is_video:
            defaults["fps"] = 16
        kinds: set[Kind] = {"video" if is_video else "image"}
        # With a strength, noise is added to a picture; some of these pipelines have None as its default even so.
        needs_image = takes_image and (takes["image"].default is inspect.Parameter.empty or "strength" in takes)
        return ModelInfo(
            kinds=frozenset(kinds),
            parameters=frozenset(takes) & {*OPTIONS, "negative_prompt", "num_frames", "image"},
            defaults=defaults,
            draws_from_image=takes_image,
            needs_image=needs_image,
            size_multiple=_size_multiple(pipeline, factor),
            # GLM-Image draws the tokens before the denoising of a whole batch from the first generator.
            max_batch=1 if is_video or "prior_token_ids" in takes else min(max_batch, most),
            description=type(pipeline).__name__,
        )


def _size_multiple(pipeline: Any, factor: int) -> int:
    """Return what width and height must be multiples of: pixels per latent, times latents per token."""
    own = getattr(pipeline, "size_multiple", None)
    if own is not None:
        return int(own)
    processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
    of_processor = int(processor.config.vae_scale_factor) if processor is not None else factor
    patch = getattr(pipeline.transformer.config, "patch_size", 1) if hasattr(pipeline, "transformer") else 1
    return math.lcm(of_processor, factor * int(patch[-1] if isinstance(patch, (list, tuple)) else patch))


def _warm_up_size(default: int, multiple: int) -> int:
    return max(min(default, _WARM_UP_PIXELS) // multiple, 1) * multiple
