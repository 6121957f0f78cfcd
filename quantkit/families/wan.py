"""Wan2.2: text or a picture to video.

A14B has two transformers of the same shape: ``transformer`` for the noisy steps, ``transformer_2`` for those below
``boundary_ratio``, each with a guidance scale of its own. TI2V-5B has one, and a timestep for every token.
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.checkpoint import Pipeline, read_json
from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.base import DiffusionFamily
from quantkit.recipe.schema import Sampling

_KEPT = {
    "condition_embedder.time_embedder": "the model computes it in float32",
    "condition_embedder": "embeds time and text once for all blocks",
    "proj_out": "the final projection",
}


class _TwoExperts(DiffusionFamily):
    """A family whose pipelines switch to ``transformer_2`` at a timestep."""

    def check_calibration(self, pipeline: Pipeline, sampling: Sampling) -> None:
        """Check that calibration has steps on both sides of the boundary."""
        import diffusers

        part = pipeline.components["scheduler"]
        scheduler_class = getattr(diffusers, part.class_name, None)
        if scheduler_class is None:
            raise CheckpointError(f"{part.folder}: {part.class_name} is no class of the installed diffusers")
        scheduler = scheduler_class.from_config(read_json(part.folder / "scheduler_config.json"))
        steps = sampling.num_inference_steps
        scheduler.set_timesteps(steps)
        boundary = pipeline.config["boundary_ratio"] * scheduler.config.num_train_timesteps
        noisy = int((scheduler.timesteps >= boundary).sum())
        if noisy in (0, len(scheduler.timesteps)):
            idle = "transformer" if noisy == 0 else "transformer_2"
            raise RecipeError(
                f"calibration.num_inference_steps: {steps} leaves {idle} without a step, as boundary_ratio is "
                f"{pipeline.config['boundary_ratio']}; give more steps"
            )


T2V = _TwoExperts(
    name="wan2.2-t2v",
    task="t2v",
    blocks={"transformer": ("blocks",), "transformer_2": ("blocks",)},
    sampling=Sampling(
        height=720,
        width=1280,
        num_frames=81,
        num_inference_steps=40,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        negative_prompt="",
        max_sequence_length=512,
    ),
    kept=_KEPT,
)

I2V = replace(
    T2V,
    name="wan2.2-i2v",
    task="i2v",
    sampling=Sampling(height=480, width=832, guidance_scale=3.5, guidance_scale_2=3.5).over(T2V.sampling),
)

TI2V = DiffusionFamily(
    name="wan2.2-ti2v",
    task="t2v",
    blocks={"transformer": ("blocks",)},
    sampling=Sampling(
        height=704,
        width=1280,
        num_frames=121,
        num_inference_steps=50,
        guidance_scale=5.0,
        negative_prompt="",
        max_sequence_length=512,
    ),
    kept=_KEPT,
)
