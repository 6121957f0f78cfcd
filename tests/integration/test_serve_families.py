"""What an engine does with a packed checkpoint of every family: it loads it, and answers requests."""

import json

import numpy as np
import pytest
from tiny_omni import build_qwen2_5_omni, build_qwen3_omni

from quantkit.checkpoint import open_model
from quantkit.families.registry import detect, family_names
from quantkit.quantize.run import prepare, quantize
from quantkit.recipe import load_recipe
from quantkit_runtime.server.models import loader
from quantkit_runtime.server.protocol import (
    ChatRequest,
    Delta,
    Finished,
    Frames,
    ImageRequest,
    Message,
    ModelSpec,
    Progress,
    TextPart,
    VideoRequest,
)

PIPELINES = ("flux", "glm_image", "ovis_image", "wan_t2v", "wan_i2v", "wan_ti2v", "bagel")
OMNI = {"qwen2.5-omni": build_qwen2_5_omni, "qwen3-omni": build_qwen3_omni}
PICTURES = ("bagel", "flux", "glm-image", "ovis-image")
VIDEOS = ("wan2.2-i2v", "wan2.2-t2v", "wan2.2-ti2v")
CHATS = ("bagel", "qwen2.5-omni", "qwen3-omni")


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    """Folder of each family's model, rounded to nearest."""
    home = tmp_path_factory.mktemp("packed")
    sources = [tiny_model(name) for name in PIPELINES]
    sources += [build(home / f"{name}-source") for name, build in OMNI.items()]
    folders = {}
    for source in sources:
        family = detect(open_model(source))
        recipe = home / f"{family.name}.yaml"
        scheme = {"group_size": 64, "iters": 0}
        model = {"id": str(source), "task": family.task}
        recipe.write_text(json.dumps({"version": 1, "model": model, "scheme": scheme}), encoding="utf-8")
        folders[family.name] = quantize(prepare(load_recipe(recipe), source), home / family.name).output
    return folders


@pytest.fixture(scope="module")
def engine(packed):
    made = {}

    def load(name):
        if name not in made:
            made[name] = loader.load(ModelSpec(path=str(packed[name]), dtype="float32"))
        return made[name]

    return load


def _run(model, request):
    """Return the frames of a request, however the model takes it."""
    if hasattr(model, "run"):
        [frames] = model.run([request], lambda _step, _steps: None)
        return frames.pixels
    events = _stream(model, request)
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2]
    assert isinstance(events[-1].result, Frames)
    return events[-1].result.pixels


def _stream(model, request):
    model.admit(request)
    events = []
    while model.active:
        events += model.step()
    assert isinstance(events[-1], Finished)
    assert {event.id for event in events} == {request.id}
    return events


def test_every_family_is_asked_for_something():
    assert sorted({*PICTURES, *VIDEOS, *CHATS}) == family_names()


@pytest.mark.parametrize("name", PICTURES)
def test_a_packed_checkpoint_of_each_family_draws_pictures(engine, name, shows):
    limit = {} if name in ("bagel", "glm-image") else {"max_sequence_length": 16}
    options = {"num_inference_steps": 2, **limit}
    first, again, other = (
        _run(engine(name), ImageRequest("one", "a red circle", (seed,), 64, 64, options)) for seed in (1, 1, 2)
    )
    assert first.shape == (1, 64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    shows(name, "serve")


@pytest.mark.parametrize("name", VIDEOS)
def test_a_packed_checkpoint_of_each_family_makes_videos(engine, name, shows):
    picture = np.full((64, 64, 3), 90, np.uint8) if name == "wan2.2-i2v" else None
    options = {"num_inference_steps": 2, "max_sequence_length": 16}
    first, other = (
        _run(engine(name), VideoRequest("one", "a red circle", seed, 64, 64, 5, 16, options, image=picture))
        for seed in (1, 2)
    )
    assert first.shape == (5, 64, 64, 3)
    assert not np.array_equal(first, other)
    shows(name, "serve")


@pytest.mark.parametrize("name", CHATS)
def test_a_packed_checkpoint_of_each_family_answers(engine, name, shows):
    request = ChatRequest("one", (Message("user", (TextPart("red circle on the left"),)),), 6, temperature=0)
    first, again = (_stream(engine(name), request) for _ in range(2))
    assert [event.text for event in first[:-1]] == [event.text for event in again[:-1]]
    assert all(isinstance(event, Delta) for event in first[:-1])
    assert 0 < first[-1].result.usage.completion_tokens <= request.max_tokens
    shows(name, "serve")
