import numpy as np
import pytest
import torch

from quantkit.demo.captions import held_out_captions, vocabulary
from quantkit.demo.dataset import LABEL_SIZES, labels
from quantkit.demo.scenes import random_scene
from quantkit.demo.stepping import adamw, repeatable, set_learning_rate
from quantkit.demo.tokenizers import CAPTION_TOKENS, build_clip_tokenizer, build_t5_tokenizer
from quantkit.demo.train import train
from quantkit.errors import OutputError


@pytest.fixture(scope="module", params=[build_clip_tokenizer, build_t5_tokenizer], ids=["clip", "t5"])
def tokenizer(request):
    return request.param()


def test_every_caption_word_is_one_token(tokenizer):
    for word in vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word


def test_captions_fit_the_caption_length(tokenizer):
    longest = max(len(tokenizer(text).input_ids) for _, text in held_out_captions(300))
    assert longest <= CAPTION_TOKENS


def test_unknown_words_tokenize(tokenizer):
    ids = tokenizer("a Zebra, ünïcode 日本 42!").input_ids
    assert len(ids) > 5
    assert max(ids) < len(tokenizer)


def test_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for text in ("", "A large red circle at the top left on white", "zebra 42"):
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_labels_stay_within_their_options_and_tell_scenes_apart():
    rng = np.random.default_rng(0)
    by_labels = {}
    for _ in range(2000):
        scene = random_scene(rng)
        row = labels(scene)
        assert all(0 <= label < size for label, size in zip(row, LABEL_SIZES, strict=True))
        assert by_labels.setdefault(tuple(row), scene) == scene


def test_learning_rate_warms_up_and_decays_to_zero():
    optimizer = adamw([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.0)

    def rate(step):
        set_learning_rate(optimizer, peak=2.0, step=step, steps=110, warm_up=10)
        return optimizer.param_groups[0]["lr"].item()

    assert rate(0) == pytest.approx(0.2)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(0.0, abs=1e-6)


def test_a_repeatable_step_trains():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = adamw([weight], weight_decay=0.0)
    set_learning_rate(optimizer, peak=0.1, step=0, steps=100, warm_up=1)

    def step():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = repeatable(step, optimizer)
    losses = [run().item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_training_refuses_an_output_that_is_not_empty(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not an empty directory"):
        train(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
