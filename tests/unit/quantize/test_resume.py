"""What an earlier run left is used only when it is whole and for the same thing."""

import os
import random

import numpy as np
import pytest
import torch

from quantkit.quantize.resume import TunedBlock, open_blocks, random_state, restore_random_state

IDENTITY = {"scheme.lr": 0.1, "source.model_index.json": "sha256 1", "device": "cpu"}


@pytest.fixture
def opened(tmp_path):
    """Open the blocks of a run; return them and what the user is told."""

    def open_for(resume=True, **changes):
        notices = []
        identity = {**IDENTITY, **{key.replace("__", "."): value for key, value in changes.items()}}
        return open_blocks(tmp_path / "kept", identity, resume=resume, on_notice=notices.append), notices

    return open_for


def fill(blocks, count):
    for index in range(count):
        block = TunedBlock("transformer", f"blocks.{index}", (2.0, 1.0), {})
        blocks.write(index, block, {f"blocks.{index}.scales": torch.full((2,), float(index))})


def test_blocks_are_found_again_as_they_were_written(opened):
    blocks, notices = opened()
    assert (blocks.files, notices) == ([], [])
    fill(blocks, 3)
    again, notices = opened()
    assert notices == ["going on after 3 tuned blocks of an earlier run"]
    block, tensors = again.read(1)
    assert block == TunedBlock("transformer", "blocks.1", (2.0, 1.0), {})
    assert tensors["blocks.1.scales"].tolist() == [1.0, 1.0]
    assert sorted(again.find_tensors("transformer")) == [f"blocks.{index}.scales" for index in range(3)]
    assert again.find_tensors("transformer_2") == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheme__lr": 0.2}, "scheme.lr changed from 0.1 to 0.2"),
        ({"scheme__lr": None}, "scheme.lr changed from 0.1 to null"),
        ({"scheme__lr": 0.2, "device": "cuda"}, "scheme.lr changed from 0.1 to 0.2 (and 1 more)"),
        ({"layers__extra": "4 bit"}, 'layers.extra changed from nothing to "4 bit"'),
    ],
)
def test_another_recipe_or_source_starts_over_with_the_reason_and_keeps_what_was_there(
    opened, tmp_path, changes, told
):
    fill(opened()[0], 2)
    blocks, notices = opened(**changes)
    assert blocks.files == []
    assert notices == [f"starting over: {told}; the earlier run's blocks are kept in {tmp_path / 'kept'}"]
    assert len(opened()[0].files) == 2


def test_a_run_that_tuned_nothing_is_not_worth_a_word(opened):
    opened()
    assert opened(device="cuda")[1] == []


def test_an_unreadable_description_of_the_other_run_is_said(opened):
    blocks, _ = opened()
    fill(blocks, 1)
    (blocks.folder / "run.json").write_text("[")
    assert opened(device="cuda")[1][0].startswith("starting over: the earlier run's description is damaged;")


def test_no_resume_forgets_the_blocks_without_a_word(opened):
    fill(opened()[0], 2)
    blocks, notices = opened(resume=False)
    assert (blocks.files, notices) == ([], [])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, os.remove, lambda path: os.truncate(path, 10)], ids=["bit", "gone", "cut"]
)
def test_a_damaged_block_and_those_after_it_are_dropped(opened, damage):
    blocks, _ = opened()
    fill(blocks, 3)
    damage(blocks.files[1])
    blocks, notices = opened()
    assert len(blocks.files) == 1
    assert notices[0].endswith("is damaged; its block and those after it are tuned again")
    assert notices[1:] == ["going on after 1 tuned block of an earlier run"]


def test_what_a_killed_write_left_is_removed(opened):
    blocks, _ = opened()
    (blocks.folder / "00000-abc.safetensors.unfinished").write_bytes(b"half")
    assert [path.name for path in opened()[0].folder.iterdir()] == ["run.json"]


def test_random_generators_go_on_where_they_were():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    before = random_state([])
    try:
        first = draw()
        restore_random_state(before, [])
        assert draw() == first
    finally:
        restore_random_state(before, [])
