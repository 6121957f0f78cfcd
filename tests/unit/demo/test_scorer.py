from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from quantkit.demo.drawing import Placement, coverage, draw, moments, place
from quantkit.demo.scenes import (
    BACKGROUND_COLOURS,
    CANVAS_PX,
    OBJECT_COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    random_scene,
)
from quantkit.demo.scorer import ATTRIBUTES, detect, score
from quantkit.errors import OutputError

DRAWN = 2000


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(7)
    found = []
    for _ in range(DRAWN):
        scene = random_scene(rng)
        found.append((scene, draw(scene, rng)))
    return found


def _other(value, options):
    options = list(options)
    return options[(options.index(value) + 1) % len(options)]


def _wrong(scene, attribute):
    """Return the scene with one attribute changed, or None where it has no such attribute."""
    first, *rest = scene.objects
    if attribute == "colour":
        taken = {item.colour for item in scene.objects}
        colour = next(name for name in OBJECT_COLOURS if name not in taken)
        changed = replace(first, colour=colour)
        return replace(scene, objects=(changed, *rest) if scene.kind == "pair" else (changed,) * len(scene.objects))
    if attribute == "shape":
        changed = replace(first, shape=_other(first.shape, SHAPES))
        return replace(scene, objects=(changed, *rest) if scene.kind == "pair" else (changed,) * len(scene.objects))
    if attribute == "size":
        return (
            None
            if first.size is None
            else replace(scene, objects=(replace(first, size=_other(first.size, SIZES)), *rest))
        )
    if attribute == "position":
        return scene.position and replace(scene, position=_other(scene.position, POSITIONS))
    if attribute == "relation":
        return scene.relation and replace(scene, relation=_other(scene.relation, RELATIONS))
    if attribute == "count":
        return replace(scene, objects=scene.objects * 2) if scene.kind == "group" else None
    return replace(scene, background=_other(scene.background, BACKGROUND_COLOURS))


def test_scorer_agrees_with_the_generator_on_every_attribute(drawn):
    right, asked = Counter(), Counter()
    for scene, image in drawn:
        for attribute, verdict in score(image, scene).items():
            right[attribute] += verdict
            asked[attribute] += 1
    assert set(asked) == set(ATTRIBUTES)
    shares = {attribute: right[attribute] / asked[attribute] for attribute in ATTRIBUTES}
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_scorer_rejects_a_wrong_attribute_and_keeps_the_others(drawn, attribute):
    asked = 0
    for scene, image in drawn[:200]:
        wrong = _wrong(scene, attribute)
        if not wrong:
            continue
        verdicts = score(image, wrong)
        assert not verdicts.pop(attribute), (scene, wrong)
        assert all(verdicts.values()), (scene, wrong, verdicts)
        asked += 1
    assert asked >= 20


def test_noise_shows_no_colour_shape_size_or_background():
    image = np.random.default_rng(0).integers(0, 256, (CANVAS_PX, CANVAS_PX, 3), dtype=np.uint8)
    scene = Scene("single", (SceneObject("red", "circle", "small"),), "white", position="center")
    verdicts = score(image, scene)
    assert not any(verdicts[name] for name in ("colour", "shape", "size", "background"))


def test_an_empty_canvas_shows_only_its_background():
    image = np.full((CANVAS_PX, CANVAS_PX, 3), BACKGROUND_COLOURS["gray"], dtype=np.uint8)
    scene = Scene("single", (SceneObject("red", "circle", "small"),), "gray", position="center")
    shown = {attribute for attribute, verdict in score(image, scene).items() if verdict}
    assert shown == {"background"}


def test_scorer_survives_noise_of_a_few_levels(drawn):
    rng = np.random.default_rng(1)
    for scene, image in drawn[:100]:
        noisy = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        assert all(score(noisy, scene).values()), scene


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_scorer_names_the_size_it_reads(image):
    with pytest.raises(OutputError, match="height=64 and width=64"):
        detect(image)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_share_of_the_box(shape):
    size_px = 30.0
    covered = coverage(shape, Placement(32.0, 32.0, size_px))
    assert covered.sum() == pytest.approx(moments(shape)[0] * size_px**2, rel=0.03)


def test_objects_stay_clear_of_the_border_and_of_each_other():
    rng = np.random.default_rng(5)
    for _ in range(500):
        boxes = place(random_scene(rng), rng)
        for box in boxes:
            margin = min(box.x_px, box.y_px, CANVAS_PX - box.x_px, CANVAS_PX - box.y_px) - box.size_px / 2
            assert margin >= 2
        for index, one in enumerate(boxes):
            for two in boxes[index + 1 :]:
                gap = max(abs(one.x_px - two.x_px), abs(one.y_px - two.y_px)) - (one.size_px + two.size_px) / 2
                assert gap >= 2
