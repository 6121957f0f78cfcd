"""Plans of the published models at their true size, from their configurations alone."""

import functools
import json
from collections import Counter

import pytest

from quantkit.checkpoint import SINGLE_MODEL, open_model
from quantkit.errors import UnsupportedModelError
from quantkit.families.published import (
    ROOT,
    SIZES,
    list_published,
    open_published,
    recall_sizes,
    size_key,
)
from quantkit.families.registry import detect
from quantkit.quantize.run import prepare
from quantkit.recipe import load_recipe
from quantkit.recipe.locate import data_dir

RECIPES = {path.stem: path for path in sorted(data_dir("recipes").glob("*.yaml"))}

# Numbers in the published files, from lists of them (see published/README.md) that nobody derived from these
# configurations.
PARAMETERS = {
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": {SINGLE_MODEL: 35_259_818_545},
    "Qwen/Qwen2.5-Omni-7B": {SINGLE_MODEL: 10_732_225_440 - 32},  # the files also hold 32 frequencies of a rotation
}
# Bytes of all the published files of a component, safetensors headers included.
FILE_BYTES = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {
        "transformer": 57_154_077_760,
        "transformer_2": 57_154_077_760,
        "text_encoder": 11_361_851_208,
        "vae": 507_591_892,
    },
}
MOST_HEADER_BYTES = 200_000

GB, GIB = 1e9, 2**30
FLUX, GLM_IMAGE, QWEN3_OMNI = (
    "black-forest-labs/FLUX.1-dev",
    "zai-org/GLM-Image",
    "Qwen/Qwen3-Omni-30B-A3B-Instruct",
)
BOTH_STAGES = "layers.components=[transformer, vision_language_encoder]"
# What others published, and how far from it the prediction may be: model, component, changes to the recipe,
# before, after, unit. See docs/results/true-size.md, also for the memory in use that is meant by FLUX's 7 GB.
PUBLISHED = [
    (FLUX, "transformer", (), (23, 0.05), (7, 0.11), GB),
    (QWEN3_OMNI, None, (), (66, 0.05), (25, 0.05), GIB),
    (GLM_IMAGE, None, (BOTH_STAGES,), (34, 0.05), (13, 0.05), GB),
]


def _is_known(hub_id):
    try:
        detect(open_model(ROOT / hub_id))
    except UnsupportedModelError:
        return False
    return True


KNOWN = [hub_id for hub_id in list_published() if _is_known(hub_id)]


@functools.cache
def opened(hub_id):
    """Open a published model once: its components remember their tensors."""
    return open_published(hub_id)


def predict(loaded):
    """Plan a recipe, the model's weights being nowhere."""
    from quantkit.demo import path

    hub_id = loaded.recipe.model.id
    return prepare(loaded, path() if hub_id == "demo" else opened(hub_id)).plan


def test_every_recipe_of_a_hub_model_has_its_configuration_here():
    ids = {load_recipe(path).recipe.model.id for path in RECIPES.values()} - {"demo"}
    assert ids <= set(list_published())


@pytest.mark.parametrize("hub_id", sorted(PARAMETERS.keys() & set(KNOWN)))
def test_the_architecture_has_as_many_parameters_as_the_published_files(hub_id):
    components = opened(hub_id).components
    assert {name: components[name].parameters for name in PARAMETERS[hub_id]} == PARAMETERS[hub_id]


@pytest.mark.parametrize("hub_id", sorted(FILE_BYTES.keys() & set(KNOWN)))
def test_the_architecture_takes_as_many_bytes_as_the_published_files(hub_id):
    components = opened(hub_id).components
    for name, nbytes in FILE_BYTES[hub_id].items():
        assert nbytes - MOST_HEADER_BYTES < components[name].nbytes < nbytes, name


@pytest.mark.parametrize(
    ("hub_id", "component", "overrides", "before", "after", "unit"),
    [case for case in PUBLISHED if case[0] in KNOWN],
    ids=[case[0] for case in PUBLISHED if case[0] in KNOWN],
)
def test_predictions_come_out_where_others_published_sizes(
    tmp_path, hub_id, component, overrides, before, after, unit
):
    recipe = tmp_path / "rounded.yaml"
    task = detect(opened(hub_id)).task
    recipe.write_text(f"version: 1\nmodel: {{id: {hub_id}, task: {task}}}\nscheme: {{iters: 0}}\n")
    plan = predict(load_recipe(recipe, overrides))
    part = plan if component is None else next(part for part in plan.components if part.component.name == component)
    assert part.nbytes_before / unit == pytest.approx(before[0], rel=before[1])
    assert part.nbytes_after / unit == pytest.approx(after[0], rel=after[1])


def test_sizes_json_holds_what_the_plans_predict(golden, shows):
    entries = []
    for path in RECIPES.values():
        loaded = load_recipe(path)
        plan = predict(loaded)
        shows(plan.family, "plan")
        entry = {"of": size_key(loaded.recipe), "before": plan.nbytes_before, "after": plan.nbytes_after}
        if entry not in entries:
            entries.append(entry)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    golden(str(SIZES), f'{{"plans": [\n{lines}\n]}}\n')


def test_sizes_are_recalled_for_what_they_depend_on_and_nothing_else():
    path = RECIPES["flux"]
    known = recall_sizes(load_recipe(path).recipe)
    assert known is not None
    assert recall_sizes(load_recipe(path, ["sampling.guidance_scale=2", "scheme.iters=7"]).recipe) == known
    for other in ("scheme.bits=8", "scheme.group_size=64", "layers.exclude=[proj_out]", "model.id=a/b"):
        assert recall_sizes(load_recipe(path, [other]).recipe) is None, other


def test_a_plan_without_weights_is_that_of_the_weights(flux_model, tmp_path, monkeypatch):
    import shutil

    from quantkit.families import published

    folder = tmp_path / "someone" / "tiny-flux"
    shutil.copytree(flux_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(published, "ROOT", tmp_path)
    assert list_published() == ["someone/tiny-flux"]
    loaded = load_recipe(RECIPES["flux"], ["model.id=someone/tiny-flux"])
    without, with_weights = (
        prepare(loaded, source).plan for source in (open_published("someone/tiny-flux"), flux_model)
    )
    assert without.as_dict() == with_weights.as_dict()
    for name, component in with_weights.source.components.items():
        assert without.source.components[name].nbytes == sum(info.nbytes for info in component.tensors.values())
        assert without.source.components[name].parameters == component.parameters


@pytest.mark.parametrize("hub_id", KNOWN)
def test_stored_dtypes_name_tensors_that_there_are(hub_id):
    path = ROOT / hub_id / "dtypes.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    components = opened(hub_id).components
    found = Counter(info.dtype for part in components.values() for info in part.tensors.values())
    assert found.keys() == {"BF16", *stored.values()}
    for start in stored:
        assert any(
            f"{name}.{tensor}".startswith(f"{start}.") for name in components for tensor in components[name].tensors
        )


def test_no_weight_is_made():
    pipeline = opened(FLUX)
    family = detect(pipeline)
    for component in pipeline.components.values():
        assert {tensor.device.type for tensor in family.build(component).parameters()} == {"meta"}
