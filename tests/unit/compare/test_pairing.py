import json

import pytest

from quantkit.checkpoint import open_model
from quantkit.compare.pairing import check_same_architecture
from quantkit.errors import UnsupportedModelError


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def pair(model):
    return model("reference"), model("candidate", error=0.1)


def check(pair):
    check_same_architecture(*map(open_model, pair))


def test_a_quantization_config_and_bookkeeping_do_not_matter(pair):
    edit(pair[1], "transformer/config.json", _diffusers_version="9", torch_dtype="float16", new_default=1)
    check(pair)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": 4}, "transformer.num_layers 2 against 4"),
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "scheduler.shift 1.0 against 3.0"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "pipeline FluxPipeline against WanPipeline"),
        ("model_index.json", {"transformer": ["torch", "Other"]}, "transformer Denoiser against Other"),
    ],
)
def test_another_architecture_is_refused_and_the_difference_named(pair, file, changes, message):
    edit(pair[1], file, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        check(pair)


def test_nested_keys_are_compared_one_by_one(pair):
    edit(pair[0], "transformer/config.json", rope={"theta": 1, "only_here": 2})
    edit(pair[1], "transformer/config.json", rope={"theta": 5})
    with pytest.raises(UnsupportedModelError, match=r"transformer\.rope\.theta 1 against 5"):
        check(pair)


def test_a_component_that_one_side_lacks_is_named(pair):
    (pair[0] / "unet").mkdir()
    (pair[0] / "unet" / "config.json").write_text("{}")
    edit(pair[0], "model_index.json", unet=["torch", "Unet"])
    with pytest.raises(UnsupportedModelError, match="unet Unet against missing"):
        check(pair)


def test_many_differences_are_counted_not_listed(pair):
    edit(pair[0], "transformer/config.json", **{f"k{index}": 0 for index in range(9)})
    edit(pair[1], "transformer/config.json", **{f"k{index}": 1 for index in range(9)})
    with pytest.raises(UnsupportedModelError, match="; 6 more"):
        check(pair)


def test_a_tokenizer_class_may_be_renamed(pair):
    for folder, name in zip(pair, ("T5Tokenizer", "T5TokenizerFast"), strict=True):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        edit(folder, "model_index.json", tokenizer=["transformers", name])
    check(pair)
