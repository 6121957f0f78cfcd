import numpy as np
import pytest
import torch

from quantkit.demo import path
from quantkit.demo.captions import held_out_captions
from quantkit.demo.evaluate import Sampling, evaluate, sample
from quantkit.demo.scorer import score

CAPTIONS = 16


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(path(), dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embedded_pipeline_draws_held_out_captions(pipeline):
    scores = evaluate(pipeline, CAPTIONS, Sampling())
    for attribute in ("colour", "shape", "background"):
        right, asked = scores[attribute]
        assert right / asked >= 0.9, scores


def test_default_caption_length_draws_as_well(pipeline):
    scores = evaluate(pipeline, 4, Sampling(num_inference_steps=12, max_sequence_length=512), batch_size=4)
    right, asked = scores["colour"]
    assert right == asked == 4


def test_same_seed_draws_the_same_image_and_another_seed_another(pipeline):
    caption = held_out_captions(1)[0][1]
    few = Sampling(num_inference_steps=4)
    first, again, other = (sample(pipeline, [caption], [seed], few)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_drawing_without_guidance_shows_colour_and_background(pipeline):
    scene, caption = held_out_captions(1)[0]
    (image,) = sample(pipeline, [caption], [0], Sampling(true_cfg_scale=1.0))
    verdicts = score(image, scene)
    assert verdicts["colour"]
    assert verdicts["background"]


def test_unknown_words_still_draw(pipeline):
    (image,) = sample(pipeline, ["a zebra in the 日本 fog"], [0], Sampling(num_inference_steps=4))
    assert image.shape == (64, 64, 3)
