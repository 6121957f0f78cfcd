"""Every kind of pipeline is served through what its own call tells of it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny.chat import build_chat

from quantkit_runtime.server.models import diffusion, loader
from quantkit_runtime.server.models.base import Cancelled, RequestRefusedError
from quantkit_runtime.server.protocol import ImageRequest, ModelSpec, VideoRequest

STEPS = {"num_inference_steps": 2, "max_sequence_length": 16}
PICTURE = np.full((64, 64, 3), 90, np.uint8)


@pytest.fixture
def load(tiny_model):
    def load_model(name):
        model = diffusion.load(ModelSpec(path=str(tiny_model(name)), dtype="float32"))
        # Padding that these models attend to, at several times the cost.
        model.info = replace(model.info, defaults=model.info.defaults | {"max_sequence_length": 16})
        return model

    return load_model


def ignore(_step, _steps):
    pass


@pytest.mark.parametrize(
    ("name", "multiple", "parameters"),
    [
        ("flux", 4, {"guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length"}),
        ("ovis_image", 4, {"guidance_scale", "negative_prompt"}),
        ("glm_image", 4, {"guidance_scale", "image"}),
    ],
)
def test_pictures(load, name, multiple, parameters):
    model = load(name)
    info = model.info
    assert (info.kinds, info.needs_image) == ({"image"}, False)
    assert info.parameters >= parameters
    assert info.size_multiple % multiple == 0
    model.warm_up()
    steps = []
    request = ImageRequest("a", "a red circle", (1, 2), 64, 64, STEPS)
    [frames] = model.run([request], lambda *step: steps.append(step))
    assert frames.pixels.shape == (2, 64, 64, 3)
    assert frames.pixels.dtype == np.uint8
    assert steps == [(1, 2), (2, 2)] if info.max_batch > 1 else [(1, 4), (2, 4), (3, 4), (4, 4)]
    alone = [model.run([ImageRequest("b", "a red circle", (seed,), 64, 64, STEPS)], ignore)[0] for seed in (1, 2)]
    for index in (0, 1):
        assert np.abs(frames.pixels[index].astype(int) - alone[index].pixels[0]).max() <= 1
    assert np.abs(alone[0].pixels.astype(int) - alone[1].pixels).max() > 1


def test_a_pipeline_that_takes_a_picture_edits(tiny_model, tmp_path):
    folder = tmp_path / "img2img"
    shutil.copytree(tiny_model("flux"), folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxImg2ImgPipeline"))
    model = diffusion.load(ModelSpec(path=str(folder), dtype="float32"))
    model.info = replace(model.info, defaults=model.info.defaults | {"max_sequence_length": 16})
    assert (model.info.draws_from_image, model.info.needs_image) == (True, True)
    model.warm_up()
    options = {"num_inference_steps": 4, "strength": 0.5, "max_sequence_length": 16}
    first, second = (
        model.run([ImageRequest("a", "a red circle", (1, 2), 64, 64, options, image=picture)], ignore)[0].pixels
        for picture in (PICTURE, 255 - PICTURE)
    )
    assert first.shape == (2, 64, 64, 3)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v", "wan_ti2v"])
def test_videos(load, name):
    model = load(name)
    info = model.info
    assert info.kinds == {"video"}
    assert info.needs_image == (name == "wan_i2v")
    assert info.defaults["fps"] == 16
    model.warm_up()
    request = VideoRequest(
        "a", "a cat", 1, 64, 64, 5, 16, STEPS, negative_prompt="a dog", image=PICTURE if info.needs_image else None
    )
    [frames] = model.run([request], ignore)
    assert frames.pixels.shape == (5, 64, 64, 3)


def test_what_a_pipeline_refuses_is_the_callers_mistake_and_a_step_can_end_it(load):
    model = load("flux")
    with pytest.raises(RequestRefusedError, match="FluxPipeline refuses it"):
        model.run([ImageRequest("a", "x", (1,), 64, 64, {**STEPS, "max_sequence_length": 4096})], ignore)

    def stop(step, _steps):
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.run([ImageRequest("a", "x", (1,), 64, 64, {**STEPS, "num_inference_steps": 50})], stop)


@pytest.mark.parametrize(
    ("name", "given", "together"),
    [
        ("flux", None, 4),
        ("flux", 12, 12),
        ("glm_image", 12, 1),  # it draws a batch from one generator
        ("wan_t2v", 12, 1),  # a video fills a device
        ("chat", None, 8),
        ("chat", 12, 12),
    ],
)
def test_how_many_requests_run_together(tiny_model, tmp_path, name, given, together):
    folder = build_chat(tmp_path / "chat") if name == "chat" else tiny_model(name)
    assert loader.load(ModelSpec(path=str(folder), max_batch=given)).info.max_batch == together


def test_more_pictures_than_run_together_are_drawn_in_parts(load):
    model = load("flux")
    model.info = replace(model.info, max_batch=2)
    steps = []
    request = ImageRequest("a", "x", (1, 2, 3), 32, 32, STEPS)
    [frames] = model.run([request], lambda *step: steps.append(step))
    assert len(frames.pixels) == 3
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
