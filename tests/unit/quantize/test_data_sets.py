"""Prompts of a data set that auto-round knows by name, with its reader replaced."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from quantkit.families.registry import get_family
from quantkit.quantize import autoround
from quantkit.recipe import Prompt


@pytest.fixture
def download(monkeypatch):
    """``download(family, batches, nsamples)``; a batch is (ids, captions[, pictures]), as auto-round makes them."""

    def download_prompts(family, batches, nsamples):
        asked = {}

        def read(dataset, **kwargs):
            asked.update(kwargs, dataset=dataset)
            return batches, 1

        name = "auto_round"
        for part in ("", ".compressors", ".diffusion", ".dataset"):
            name += part
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].get_diffusion_dataloader = read
        job = SimpleNamespace(dataset="coco2014", seed=7, nsamples=nsamples)
        return autoround._download_prompts(job, get_family(family)), asked

    return download_prompts


def test_captions_are_read_without_pictures_where_none_are_needed(download):
    prompts, asked = download("wan2.2-t2v", [(["1"], ("a cat",)), (["2"], ("a dog",))], 2)
    assert prompts == [Prompt("a cat"), Prompt("a dog")]
    assert asked == {"dataset": "coco2014", "bs": 1, "seed": 7, "nsamples": 2, "image_required": False}


def test_image_to_video_gets_the_pictures(download):
    prompts, asked = download("wan2.2-i2v", [(["1"], ("a cat",), ("/data/cat.jpg",))], 1)
    assert prompts == [Prompt("a cat", "/data/cat.jpg")]
    assert asked["image_required"]


def test_more_prompts_than_asked_for_are_left_out(download):
    prompts, _ = download("wan2.2-t2v", [(["1"], ("a cat",)), (["2"], ("a dog",))], 1)
    assert prompts == [Prompt("a cat")]


def test_a_data_set_that_is_too_small_is_refused(download):
    with pytest.raises(autoround._Gone, match=r"coco2014 holds 1 prompts, scheme\.nsamples asks for 3; lower it"):
        download("wan2.2-t2v", [(["1"], ("a cat",))], 3)
