"""Where recipes and prompt files are looked for, and in which order."""

import os

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe import find_prompts, find_recipe, list_recipes, load_recipe
from quantkit.recipe.locate import data_dir


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Two folders on $QUANTKIT_RECIPE_PATH, and another as working directory."""
    folders = [tmp_path / name for name in ("first", "second", "cwd")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("QUANTKIT_RECIPE_PATH", os.pathsep.join(map(str, folders[:2])))
    monkeypatch.chdir(folders[2])
    return folders


def test_a_path_wins_over_the_search_path_and_that_over_what_comes_with_quantkit(elsewhere):
    first, second, cwd = elsewhere
    assert find_recipe("flux") == find_recipe("flux.yaml") == data_dir("recipes") / "flux.yaml"
    (second / "flux.yaml").touch()
    assert find_recipe("flux") == second / "flux.yaml"
    (first / "flux.yaml").touch()
    assert find_recipe("flux") == first / "flux.yaml"
    (cwd / "flux.yaml").touch()
    assert find_recipe("flux.yaml").resolve() == cwd / "flux.yaml"
    assert find_recipe("flux") == first / "flux.yaml"


def test_recipes_of_the_search_path_are_listed_with_those_that_come_with_quantkit(elsewhere):
    (elsewhere[0] / "mine.yaml").touch()
    names = list_recipes()
    assert names["mine"] == elsewhere[0] / "mine.yaml"
    assert {"flux", "flux-tuned", "demo-flux"} <= names.keys()
    assert list(names) == sorted(names)


@pytest.mark.usefixtures("elsewhere")
def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"^fluxx: no such recipe \(did you mean flux\?\)"):
        find_recipe("fluxx")
    with pytest.raises(RecipeError, match=r"known recipes: .*flux"):
        find_recipe("/nowhere/at/all/zzzz.yaml")


def test_prompts_are_looked_for_beside_the_recipe_first(elsewhere):
    first, _, cwd = elsewhere
    recipe = first / "r.yaml"
    assert find_prompts("t2i.txt", recipe) == data_dir("prompts") / "t2i.txt"
    (cwd / "t2i.txt").touch()
    assert find_prompts("t2i.txt", recipe).resolve() == cwd / "t2i.txt"
    (first / "t2i.txt").touch()
    assert find_prompts("t2i.txt", recipe) == first / "t2i.txt"


def test_missing_prompts_name_the_recipe_and_the_places(elsewhere):
    recipe = elsewhere[0] / "r.yaml"
    with pytest.raises(RecipeError) as caught:
        find_prompts("nope.txt", recipe)
    assert str(caught.value).startswith(
        f"{recipe}: prompts: no file nope.txt (looked for {elsewhere[0] / 'nope.txt'}"
    )


def test_prompts_that_a_checkpoint_names_are_not_taken_from_the_working_directory(elsewhere):
    manifest = elsewhere[0] / "quantkit.json"
    (elsewhere[2] / "mine.txt").touch()
    (elsewhere[2] / "t2i.txt").touch()
    with pytest.raises(RecipeError, match=r"no file mine\.txt .*; give it with --prompts, or with --recipe "):
        find_prompts("mine.txt", manifest)
    assert find_prompts("t2i.txt", manifest) == data_dir("prompts") / "t2i.txt"
    assert find_prompts(str(elsewhere[2] / "mine.txt"), manifest) == elsewhere[2] / "mine.txt"


@pytest.mark.parametrize("name", ["flux", "flux-tuned", "demo-flux"])
def test_every_recipe_that_comes_with_quantkit_is_valid(name):
    assert load_recipe(find_recipe(name)).recipe.version == 1
