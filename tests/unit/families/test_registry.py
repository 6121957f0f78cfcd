"""Finding a model's family, and what families ask of recipes and prompts."""

import json

import pytest

from quantkit.errors import RecipeError, UnsupportedModelError
from quantkit.families.registry import detect, family_names, get_family
from quantkit.recipe import Prompt
from quantkit.recipe.schema import Sampling


@pytest.fixture
def model(tmp_path):
    def write(class_name, **settings):
        index = {"_class_name": class_name, "transformer_2": [None, None], **settings}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("family", "class_name", "settings"),
    [
        ("flux", "FluxPipeline", {}),
        ("glm-image", "GlmImagePipeline", {}),
        ("ovis-image", "OvisImagePipeline", {}),
        ("wan2.2-t2v", "WanPipeline", {"boundary_ratio": 0.875, "expand_timesteps": False}),
        ("wan2.2-i2v", "WanImageToVideoPipeline", {"boundary_ratio": 0.9, "expand_timesteps": False}),
        ("wan2.2-ti2v", "WanPipeline", {"boundary_ratio": None, "expand_timesteps": True}),
    ],
)
def test_a_family_is_known_by_class_and_settings(model, family, class_name, settings):
    found = detect(model(class_name, **settings))
    assert found is get_family(family)
    assert found.name == family


def test_a_wan_pipeline_of_another_kind_is_refused(model):
    folder = model("WanPipeline", boundary_ratio=None, expand_timesteps=False)
    with pytest.raises(UnsupportedModelError) as caught:
        detect(folder)
    assert str(caught.value) == (
        f"{folder}: no family knows WanPipeline without boundary_ratio or expand_timesteps in model_index.json "
        f"(known: {', '.join(family_names())})"
    )


def test_an_unknown_pipeline_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"no family knows AudioPipeline \(known: bagel, flux, "):
        detect(model("AudioPipeline"))


@pytest.mark.parametrize("name", family_names())
def test_a_family_calls_itself_what_the_registry_calls_it(name):
    assert get_family(name).name == name


def test_guidance_of_the_second_expert_is_for_families_that_have_one():
    given = Sampling(guidance_scale_2=2.0)
    assert get_family("wan2.2-t2v").sampling_for(given).guidance_scale_2 == 2.0
    with pytest.raises(RecipeError, match=r"sampling: wan2\.2-ti2v takes no guidance_scale_2 "):
        get_family("wan2.2-ti2v").sampling_for(given)


def test_only_image_to_video_is_given_the_picture(tmp_path):
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.new("L", (8, 4), 7).save(path)
    prompt = Prompt("go", str(path))
    assert get_family("wan2.2-t2v").prompt_kwargs(prompt) == {"prompt": "go"}
    kwargs = get_family("wan2.2-i2v").prompt_kwargs(prompt)
    assert kwargs["prompt"] == "go"
    assert (kwargs["image"].mode, kwargs["image"].size) == ("RGB", (8, 4))
