from itertools import islice

import numpy as np
import pytest

from quantkit.demo.captions import VARIANTS, WORDINGS, caption, held_out_captions, vocabulary
from quantkit.demo.prompts import write_prompts
from quantkit.demo.scenes import Scene, SceneObject, held_out_scenes, random_scene, scenes
from quantkit.errors import OutputError

RED_CIRCLE = SceneObject("red", "circle", "small")
BLUE_STAR = SceneObject("blue", "star", "large")


def test_same_seed_gives_the_same_captions():
    assert held_out_captions(40, seed=3) == held_out_captions(40, seed=3)
    assert held_out_captions(40, seed=3) != held_out_captions(40, seed=4)


def test_a_longer_list_begins_with_the_shorter_one():
    assert held_out_captions(50)[:20] == held_out_captions(20)


def test_held_out_scenes_are_different_from_each_other():
    assert len({scene.key() for scene in held_out_scenes(512)}) == 512


def test_no_held_out_scene_occurs_in_training():
    training = {scene.key() for scene in islice(scenes("train", seed=20), 5000)}
    assert training.isdisjoint(scene.key() for scene in held_out_scenes(512))


def test_one_scene_in_ten_is_held_out():
    rng = np.random.default_rng(0)
    share = np.mean([random_scene(rng).is_held_out() for _ in range(5000)])
    assert 0.085 < share < 0.115


@pytest.mark.parametrize(("relation", "mirrored"), [("left of", "right of"), ("above", "below")])
def test_a_mirrored_relation_is_the_same_scene(relation, mirrored):
    scene = Scene("pair", (RED_CIRCLE, BLUE_STAR), "white", relation=relation)
    swapped = Scene("pair", (BLUE_STAR, RED_CIRCLE), "white", relation=mirrored)
    unswapped = Scene("pair", (RED_CIRCLE, BLUE_STAR), "white", relation=mirrored)
    assert scene.key() == swapped.key()
    assert scene.key() != unswapped.key()


def test_every_wording_names_every_attribute():
    single = Scene("single", (RED_CIRCLE,), "white", position="top left")
    pair = Scene("pair", (RED_CIRCLE, BLUE_STAR), "gray", relation="left of")
    group = Scene("group", (SceneObject("red", "cross", None),) * 3, "black")
    words = {
        single: ["small", "red", "circle", "top left", "white"],
        pair: ["small red circle", "large blue star", "left of", "gray"],
        group: ["three", "red", "cross", "black"],
    }
    for scene, named in words.items():
        for wording in WORDINGS:
            for variant in range(VARIANTS):
                text = caption(scene, wording, variant)
                assert all(word in text for word in named), text


def test_short_wordings_are_shorter_than_long_ones():
    for scene in held_out_scenes(30):
        assert len(caption(scene, "short")) < len(caption(scene, "long"))


def test_the_vocabulary_covers_the_captions():
    words = set(vocabulary())
    for _, text in held_out_captions(200):
        assert {word.strip(",.;:") for word in text.split()} <= words


def test_prompt_files_hold_one_caption_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    write_prompts(file, count=4, skip=2)
    assert file.read_text().splitlines() == [text for _, text in held_out_captions(6)[2:]]


def test_an_unwritable_prompt_file_is_named(tmp_path):
    with pytest.raises(OutputError, match="missing"):
        write_prompts(tmp_path / "missing" / "prompts.txt", count=1)
