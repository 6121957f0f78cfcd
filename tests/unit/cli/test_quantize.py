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
    return _next_command(recipe, "org/model", prepared, Path("out"))


def test_the_result_is_compared_with_its_source_as_the_recipe_says():
    assert next_command("flux") == [
        "compare", "--task", "t2i", "--reference", "org/model", "--candidate", "out", "--recipe", "flux",
        "--output", "out-report",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", ["flux", "wan2.2-t2v", "wan2.2-i2v", "qwen2.5-omni", "bagel"])
def test_a_recipe_without_prompts_is_compared_on_those_that_come_with_quantkit(recipe):
    command = next_command(recipe, "compare.prompts=null")
    assert find_prompts(command[command.index("--prompts") + 1], None).is_file()
