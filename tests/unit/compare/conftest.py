"""A stand-in for a diffusers pipeline that draws discs: it moves noise to a picture in equal steps."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import quantkit_runtime


class Denoiser(torch.nn.Module):
    """Predicts the way to the prompt's picture, off by a field of a given strength."""

    def __init__(self, error: float, bad_from_step: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64 if error else 256))
        self.error = error
        self.bad_from_step = bad_from_step

    def forward(self, hidden_states, target, remaining, step):
        field = torch.randn(target.shape, generator=torch.Generator().manual_seed(99)) * self.error
        velocity = (target + field - hidden_states) / remaining
        return velocity * float("nan") if step == self.bad_from_step else velocity


class Scheduler:
    """Goes the whole of the predicted step."""

    def step(self, model_output, _timestep, sample):
        return sample + model_output


class Pipeline:
    """Just as much of a diffusers text-to-image pipeline as a comparison touches."""

    def __init__(self, error=0.0, bad_from_step=None, bad_image=False, noise_offset=0.0):
        self.transformer = Denoiser(error, bad_from_step)
        self.scheduler = Scheduler()
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.bad_image = bad_image
        self.noise_offset = noise_offset
        self.num_timesteps = 0

    def set_progress_bar_config(self, **_kwargs):
        pass

    @torch.no_grad()
    def __call__(
        self, prompt, generator, callback_on_step_end, callback_on_step_end_tensor_inputs, output_type,
        height, width, num_inference_steps, **_kwargs,
    ):  # fmt: skip
        assert callback_on_step_end_tensor_inputs == ["latents"]
        assert output_type == "np"
        target = torch.from_numpy(draw(prompt, height, width))
        latents = torch.randn((3, height, width), generator=generator) + self.noise_offset
        self.num_timesteps = num_inference_steps
        for step in range(num_inference_steps):
            velocity = self.transformer(
                hidden_states=latents, target=target, remaining=num_inference_steps - step, step=step
            )
            latents = self.scheduler.step(velocity, 1000.0 - step, latents)
            callback_on_step_end(self, step, torch.tensor(1000.0 - step), {"latents": latents})
        image = (latents / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        return SimpleNamespace(images=[image * float("nan") if self.bad_image else image])


def draw(prompt: str, height: int, width: int) -> np.ndarray:
    """Return a disc whose place and colour follow from the prompt, float32 (3, height, width), -1 to 1."""
    code = np.random.default_rng(zlib.crc32(prompt.encode()))
    x, y, radius = code.uniform(0.3, 0.7) * width, code.uniform(0.3, 0.7) * height, 0.22 * min(height, width)
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    colours = code.uniform(-0.9, 0.9, (2, 3, 1, 1))
    return np.where(disc, colours[0], colours[1]).astype(np.float32)


def write_model(folder: Path, *, layers: int = 2, class_name: str = "FluxPipeline", **behaviour) -> Path:
    """Write a model folder that the stand-in loader understands."""
    index = {
        "_class_name": class_name,
        "transformer": ["torch", "Denoiser"],
        "scheduler": ["torch", "Scheduler"],
    }
    config = {"num_layers": layers}
    if behaviour.get("error"):
        config["quantization_config"] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    for path, content in {
        "model_index.json": index,
        "transformer/config.json": config,
        "scheduler/scheduler_config.json": {"shift": 1.0},
        "behaviour.json": behaviour,
    }.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Return a function that makes a model folder by name and behaviour; the runtime loads it as a stand-in."""

    def load(folder, **_settings):
        return Pipeline(**json.loads((Path(folder) / "behaviour.json").read_text()))

    monkeypatch.setattr(quantkit_runtime, "load_pipeline", load, raising=False)
    # Collecting garbage in a process this full takes longer than all that is tested here.
    monkeypatch.setattr("quantkit.compare.footprint.free_memory", lambda _device: None)
    return lambda name, **behaviour: write_model(tmp_path / name, **behaviour)


@pytest.fixture
def pipeline():
    """Return the class of the stand-in pipeline."""
    return Pipeline
