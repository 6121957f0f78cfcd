"""``quantkit quantize``: the command that it names for afterwards; that it runs is tested in tests/integration."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from quantkit.cli.quantize import _next_command
from quantkit.families.registry import get_family
from quantkit.recipe import find_prompts, find_recipe, load_recipe


def next_command(recipe, *overrides):
    loaded = load_recipe(find_recipe(recipe), overrides)
    prepared = SimpleNamespace(loaded=loaded, family=get_family(loaded.recipe.model.family))
    return _next_command("org/model", prepared, Path("out"))


def test_the_result_is_compared_with_its_source_as_its_own_recipe_says_that_knows_the_overrides():
    assert next_command("flux") == [
        "compare", "--task", "t2i", "--reference", "org/model", "--candidate", "out", "--output", "out-report",
    ]  # fmt: skip


def test_prompts_beside_the_recipe_are_named_since_they_are_not_beside_the_result(tmp_path):
    (tmp_path / "mine.txt").write_text("a red circle")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {id: a, family: flux}\nscheme: {iters: 0}\ncompare: {prompts: mine.txt}\n"
    )
    command = next_command(str(recipe))
    assert command[command.index("--prompts") + 1] == str(tmp_path / "mine.txt")
    (tmp_path / "mine.txt").unlink()
    assert "--prompts" not in next_command(str(recipe))


@pytest.mark.parametrize("recipe", ["flux", "wan2.2-t2v", "wan2.2-i2v", "qwen2.5-omni", "bagel"])
def test_a_recipe_without_prompts_is_compared_on_those_that_come_with_quantkit(recipe):
    command = next_command(recipe, "compare.prompts=null")
    assert find_prompts(command[command.index("--prompts") + 1], None).is_file()
