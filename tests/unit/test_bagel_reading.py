"""What BAGEL reads and writes: texts and pictures one after the other, as its authors feed them."""

import numpy as np
import pytest
import tiny_bagel
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.generation.batch import Batch, write_greedily
from quantkit_runtime.generation.sampling import SamplingParams
from quantkit_runtime.models.bagel_processor import BagelProcessor

SIDE, PATCH = 4, 14  # of the tiny model's largest picture


@pytest.fixture(scope="module")
def model():
    return tiny_bagel.random_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bagel.build_bagel(tmp_path_factory.mktemp("bagel") / "model")


@pytest.fixture(scope="module")
def processor(folder):
    return BagelProcessor(folder)


@pytest.fixture(scope="module")
def writer(model, processor):
    return model.make_writer(processor.tokenizer)


def picture(width=56, height=28, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_texts_stand_between_marks_and_all_of_a_picture_has_one_position(processor):
    begin, end, looks, looked = processor.marks
    what, red = processor.tokenizer.convert_tokens_to_ids(["what", "red"])
    inputs = processor(["red", picture(), "what red"])
    patches = 4 * 2
    assert inputs["input_ids"].tolist() == [
        [begin, red, end, looks, *[looks] * patches, looked, begin, what, red, end, begin]
    ]
    assert inputs["positions"].tolist() == [[0, 1, 2, *[3] * (patches + 2), 4, 5, 6, 7, 8]]
    assert inputs["pictures"].tolist() == [[0, 0, 0, *[1] * (patches + 2), 0, 0, 0, 0, 0]]
    assert inputs["is_patch"].sum() == patches
    assert inputs["patch_positions"].tolist() == [0, 1, 2, 3, SIDE, SIDE + 1, SIDE + 2, SIDE + 3]
    assert processor(["red"], answer=False)["input_ids"].tolist() == [[begin, red, end]]


def test_patches_hold_the_pixels_row_by_row_with_channels_last(processor):
    image = picture()
    patches = processor([image])["patches"]
    pixels = patches.view(2, 4, PATCH, PATCH, 3).transpose(1, 2).reshape(28, 56, 3)
    np.testing.assert_allclose((pixels.numpy() + 1) * 127.5, np.asarray(image), atol=1e-4)


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_a_picture_of_any_size_becomes_patches_that_the_model_knows(processor, width, height):
    columns, rows = processor._grid(width, height)
    assert 1 <= columns <= SIDE
    assert 1 <= rows <= SIDE
    assert (columns >= rows) == (width >= height) or columns == rows


def test_pictures_of_the_published_size_are_cut_as_by_the_authors(processor, monkeypatch):
    monkeypatch.setattr(processor, "_side", 70)
    # (width, height) -> (width, height), by ImageTransform(980, 224, 14) of the authors' code
    for size, expected in {
        (1024, 1024): (980, 980), (640, 480): (644, 476), (100, 50): (448, 224), (3000, 1000): (980, 322),
        (224, 224): (224, 224), (1920, 1080): (980, 546), (5000, 100): (980, 14),
    }.items():  # fmt: skip
        columns, rows = processor._grid(*size)
        assert (columns * PATCH, rows * PATCH) == expected, size


@torch.inference_mode()
def test_a_conversation_is_read_as_its_parts_one_after_the_other(model, processor, writer):
    """The authors fill the cache part by part: a text looks back, a picture looks at all of itself, too."""
    parts = ["what is red", picture(), "red circle on the left", picture(28, 56, seed=1), "what is on the right"]
    language = model.language_model
    keys = [[] for _ in language.model.layers]
    values = [[] for _ in language.model.layers]

    class Cache:
        def update(self, new_keys, new_values, layer):
            keys[layer].append(new_keys)
            values[layer].append(new_values)
            return torch.cat(keys[layer], 2), torch.cat(values[layer], 2)

    position = read = 0

    def feed(embedded, positions, mask):
        nonlocal read
        read += embedded.shape[0]
        return language.model(
            embedded[None], positions=torch.tensor([positions]), attention_mask=mask[None, None], cache=Cache()
        )

    begin, end, looks, looked = processor.marks
    for part in parts:
        if isinstance(part, str):
            tokens = [begin, *processor.tokenizer.encode(part, add_special_tokens=False), end]
            mask = torch.ones(len(tokens), read + len(tokens), dtype=torch.bool).tril(read)
            feed(language.model.embed_tokens(torch.tensor(tokens)), range(position, position + len(tokens)), mask)
            position += len(tokens)
        else:
            inputs = processor([part], answer=False)
            seen = model.embed_picture(inputs["patches"], inputs["patch_positions"])
            first, last = language.model.embed_tokens(torch.tensor([looks, looked]))
            embedded = torch.cat([first[None], seen, last[None]])
            count = len(embedded)
            feed(embedded, [position] * count, torch.ones(count, read + count, dtype=torch.bool))
            position += 1
    hidden = feed(
        language.model.embed_tokens(torch.tensor([begin])), [position], torch.ones(1, read + 1, dtype=torch.bool)
    )
    expected = language.lm_head(hidden[0, -1])
    found = writer.read(processor(parts))
    torch.testing.assert_close(found.logits_V, expected, rtol=1e-4, atol=1e-4)
    assert found.position_shift == position + 1 - read
    other = writer.read(processor([*parts[:3], picture(28, 56, seed=2), parts[4]]))
    assert not torch.allclose(other.logits_V, expected, atol=1e-3)


@torch.inference_mode()
def test_answers_are_those_of_the_text_model_token_by_token(model, processor, writer):
    inputs = processor(["what is red"])
    exact = tiny_bagel.qwen3(model)
    expected = exact.generate(
        inputs["input_ids"], do_sample=False, max_new_tokens=12, eos_token_id=processor.marks[1], pad_token_id=0
    )[0, inputs["input_ids"].shape[1] :].tolist()
    assert [piece.token for piece in write_greedily(writer, processor.tokenizer, inputs, 12)] == expected


def test_answers_beside_others_are_those_of_each_alone(processor, writer):
    prompts = [["what is red"], [picture(), "what is on the left"], [picture(42, 56, 3), picture(), "red or blue"]]
    params = SamplingParams(max_tokens=10, temperature=0, repetition_penalty=1.3, ignore_eos=True)

    def write(some):
        batch = Batch(writer, processor.tokenizer, max_batch=3)
        tokens = {str(index): [] for index in range(len(some))}
        for index, parts in enumerate(some):
            batch.add(str(index), processor(parts), params)
        while len(batch):
            for piece in batch.step():
                tokens[piece.key].append(piece.token)
        return list(tokens.values())

    assert write(prompts) == [write([parts])[0] for parts in prompts]


@torch.inference_mode()
def test_predictions_along_an_answer_are_those_of_writing_it(model, processor, writer):
    inputs = processor([picture(), "what is red"])
    answer = [7, 9, 6, 11]
    found = writer.predict(inputs, answer)
    assert found.shape == (len(answer), model.config.text.vocab_size)
    for count in range(1, len(answer) + 1):
        torch.testing.assert_close(writer.predict(inputs, answer[:count])[-1], found[count - 1])
    torch.testing.assert_close(found[0], writer.read(inputs).logits_V)


def test_a_tokenizer_without_the_marks_is_one_clear_error(tmp_path):
    folder = tiny_bagel.build_bagel(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|vision_end|>", "<|other|>"))
    with pytest.raises(CheckpointFormatError, match=r"bare: its tokenizer has no <\|vision_end\|>"):
        BagelProcessor(folder)
