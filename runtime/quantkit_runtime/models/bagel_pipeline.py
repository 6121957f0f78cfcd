"""Drawing with BAGEL, called like any diffusers pipeline that draws from a text.

The understanding expert reads the prompt once; what it leaves in the cache is all that the drawing expert sees of
it. Each step then runs latents, between the marks of a picture, through the drawing expert. Guidance runs them once
more without a prompt, and scales the result down to the length that it had without guidance. As its authors do it
(``generate_image`` of ByteDance-Seed/Bagel, arXiv 2505.14683).

Shapes: T latent tokens, L channels of one (16 latent channels of 2 x 2), H heads, D channels of one head, P tokens
of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit_runtime.models.bagel import Bagel
from quantkit_runtime.models.bagel_processor import BagelProcessor
from quantkit_runtime.models.flux_vae import read_flux_vae
from quantkit_runtime.optional import import_optional

_Pipeline: Any = import_optional("diffusers").DiffusionPipeline
_SHIFT = 3.0
"""How much longer the steps stay in noise, see ``FlowMatchEulerDiscreteScheduler``."""
_TRAIN_TIMESTEPS = 1000

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of a prompt in every layer, each (1, H, P, D)."""


class _Prompt:
    """A cache that what is drawn sees, and does not change."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `quantkit_runtime.models.bagel.Cache`."""
        if not self._layers:
            return keys, values
        before = self._layers[layer]
        return torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)


class BagelDenoiser(nn.Module):
    """One step of drawing: from latents to their velocity.

    Args:
        bagel: The model.
        marks: Tokens that begin and end a picture.
    """

    _repeated_blocks = ("DecoderLayer",)

    def __init__(self, bagel: Bagel, marks: tuple[int, int]) -> None:
        super().__init__()
        self.bagel = bagel
        self._marks = marks

    @property
    def tensor_parallel_group(self) -> Any:
        """The ranks that share the model's weights, None if it is whole."""
        return getattr(self.bagel, "tensor_parallel_group", None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not packed."""
        weight: Tensor = self.bagel.vae2llm.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Of all weights."""
        weight: Tensor = self.bagel.vae2llm.weight
        return weight.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, places: Tensor, prompt: Layers, position: int
    ) -> Tensor:
        """Return the velocity, which points from the picture to noise.

        Args:
            hidden_states: Latents, (1, T, L), float32; called so in diffusers' transformers.
            timestep: (1,), 1 for noise and 0 for the picture.
            places: Int64 (T,), in the grid of the largest picture.
            prompt: What was read before; empty for the branch without.
            position: Of all tokens of the picture: the one that follows the prompt.

        Returns:
            (1, T, L), float32.
        """
        bagel, decoder, device = self.bagel, self.bagel.language_model.model, hidden_states.device
        drawn = bagel.vae2llm(hidden_states.to(self.dtype))
        drawn = drawn + bagel.time_embedder(timestep)[:, None] + bagel.latent_pos_embed(places)
        begin, end = decoder.embed_tokens(torch.tensor([self._marks], device=device)).split(1, dim=1)
        hidden = torch.cat((begin, drawn, end), dim=1)
        is_latent = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device)
        is_latent[:, [0, -1]] = False
        hidden = decoder(
            hidden,
            positions=torch.full(hidden.shape[:2], position, device=device),
            is_causal=False,
            latent=is_latent,
            cache=_Prompt(prompt),
        )
        velocity: Tensor = bagel.llm2vae(hidden[:, 1:-1]).float()
        return velocity


class BagelPipeline(_Pipeline):  # type: ignore[misc]  # diffusers is optional
    """Draws pictures from texts, one at a time.

    Args:
        transformer: Draws.
        vae: diffusers' ``AutoencoderKL``.
        scheduler: diffusers' ``FlowMatchEulerDiscreteScheduler``.
        processor: Of the model's folder.
    """

    _callback_tensor_inputs = ("latents",)
    max_prompts = 1
    """Guidance measures a whole picture, so pictures cannot be drawn side by side."""

    def __init__(self, transformer: BagelDenoiser, vae: Any, scheduler: Any, processor: BagelProcessor) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, processor=processor)
        config = transformer.bagel.config
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._patch = config.latent_patch_size
        self._side = round(config.latent_positions**0.5)
        self.size_multiple = self.vae_scale_factor * self._patch
        self.default_sample_size = self._side * self._patch
        self.num_timesteps = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.4, 1.0),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw one picture.

        Args:
            prompt: What to draw.
            height: In pixels, a multiple of `size_multiple`; None is the largest that the model knows.
            width: Likewise.
            num_inference_steps: The authors' 50 points in time have 49 steps between them.
            guidance_scale: Above 1 each step inside of ``guidance_interval`` runs the model twice.
            guidance_interval: Times between which there is guidance, the first excluded; 1 is noise.
            generator: Of the noise.
            latents: Noise, (1, T, L), instead of drawing it.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            callback_on_step_end: As in all pipelines of diffusers.
            callback_on_step_end_tensor_inputs: ``latents`` is the only one.

        Raises:
            ValueError: A size, the number of prompts or steps, the prompt's length, the shape of ``latents`` or a
                callback's tensor is none that the model takes.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        height, width = (self.default_sample_size * self.vae_scale_factor if side is None else side
                         for side in (height, width))  # fmt: skip
        self._check(texts, height, width, num_inference_steps, callback_on_step_end_tensor_inputs)
        device = self.transformer.device
        rows, columns = height // self.size_multiple, width // self.size_multiple
        places = (torch.arange(rows)[:, None] * self._side + torch.arange(columns)).flatten().to(device)
        shape = (1, rows * columns, self.transformer.bagel.config.latent_dim)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: must have shape {shape}, not {tuple(latents.shape)}")
        noise = import_optional("diffusers.utils.torch_utils").randn_tensor
        latents = (noise(shape, generator, device) if latents is None else latents).float().to(device)
        layers, position = self._read(texts[0])
        points = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=points.tolist(), device=device)
        self.num_timesteps = len(self.scheduler.timesteps)
        times = self.scheduler.timesteps / _TRAIN_TIMESTEPS
        is_guided = [
            guidance_scale > 1 and guidance_interval[0] < time <= guidance_interval[1] for time in times.tolist()
        ]
        with self.progress_bar(total=self.num_timesteps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                time = times[index : index + 1]
                velocity = self.transformer(latents, time, places, layers, position)
                if is_guided[index]:
                    unguided = self.transformer(latents, time, places, (), 0)
                    velocity = _guide(velocity, unguided, guidance_scale)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, index, timestep, {"latents": latents}).get(
                        "latents", latents
                    )
                progress.update()
        images = latents if output_type == "latent" else self._decode(latents, rows, columns, output_type)
        output = import_optional("diffusers.pipelines.pipeline_utils").ImagePipelineOutput
        return output(images=images) if return_dict else (images,)

    def save_pretrained(self, *_args: Any, **_options: Any) -> None:
        """Refuse: its folder is not laid out as diffusers' are.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a BAGEL has no layout of diffusers; copy the folder that it was loaded from")

    def _check(self, texts: list[str], height: int, width: int, steps: int, tensors: Sequence[str]) -> None:
        if len(texts) != self.max_prompts:
            raise ValueError(f"prompt: one picture at a time, not {len(texts)}")
        if steps < 1:
            raise ValueError(f"num_inference_steps: must be at least 1, not {steps}")
        for name, value in (("height", height), ("width", width)):
            if value % self.size_multiple or not 0 < value <= self._side * self.size_multiple:
                raise ValueError(
                    f"{name}: must be a multiple of {self.size_multiple} up to {self._side * self.size_multiple}, "
                    f"not {value}"
                )
        if unknown := set(tensors) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: knows latents alone, not {', '.join(unknown)}")

    def _read(self, text: str) -> tuple[Layers, int]:
        """Return what a prompt leaves in the cache, and the position that follows it."""
        inputs = self.processor([text], answer=False)
        tokens, most = inputs["input_ids"].shape[1], self.transformer.bagel.config.text.max_position_embeddings
        if tokens >= most:
            raise ValueError(f"prompt: {tokens} tokens; the model reads at most {most - 1}")
        read = self.transformer.bagel.make_writer(self.processor.tokenizer).read(inputs)
        layers = tuple((layer.keys, layer.values) for layer in read.cache.layers)
        return layers, int(inputs["positions"][0, -1]) + 1

    def _decode(self, latents: Tensor, rows: int, columns: int, output_type: str) -> Any:
        """Turn latents (1, T, L) into a picture."""
        side, channels = self._patch, self.vae.config.latent_channels
        grid = latents.view(1, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
        grid = grid.reshape(1, channels, rows * side, columns * side)
        scaled = grid / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pixels = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]
        processor = import_optional("diffusers.image_processor").VaeImageProcessor()
        return processor.postprocess(pixels, output_type=output_type)


def _guide(velocity: Tensor, unguided: Tensor, scale: float) -> Tensor:
    """Go further away from the velocity without a prompt, and be no longer than before."""
    guided = unguided + scale * (velocity - unguided)
    shrinking: Tensor = velocity.norm() / (guided.norm() + 1e-8)
    return guided * shrinking.clamp(max=1.0)


def make_pipeline(folder: Path, bagel: Bagel, dtype: torch.dtype) -> BagelPipeline:
    """Return the pipeline of a model that is loaded; the VAE comes from ``ae.safetensors`` beside it.

    Raises:
        CheckpointFormatError: The VAE, or the tokenizer, cannot be read.
    """
    processor = BagelProcessor(folder)
    *_, begin, end = processor.marks
    scheduler = import_optional("diffusers").FlowMatchEulerDiscreteScheduler(_TRAIN_TIMESTEPS, shift=_SHIFT)
    vae = read_flux_vae(folder / "ae.safetensors", dtype)
    return BagelPipeline(BagelDenoiser(bagel, (begin, end)), vae, scheduler, processor)
