"""The embedded model under its own recipe: 4 bit keeps the thresholds, 2 bit does not."""

import pytest

import quantkit.demo
from quantkit.compare.request import Request
from quantkit.compare.run import compare
from quantkit.quantize.run import prepare, quantize
from quantkit.recipe import find_prompts, find_recipe, load_recipe, read_prompts

PROMPTS = 12


@pytest.fixture(scope="module")
def verdict_of(tmp_path_factory):
    """Quantize the embedded model with overrides on top of its recipe, and let the recipe judge it."""

    def judge(*overrides: str):
        folder = tmp_path_factory.mktemp("verdict")
        loaded = load_recipe(find_recipe("demo-flux"), overrides)
        quantize(prepare(loaded, quantkit.demo.path()), folder / "candidate")
        recipe = loaded.recipe
        prompts = read_prompts(find_prompts(recipe.compare.prompts, loaded.path))
        request = Request(
            reference=quantkit.demo.path(),
            candidate=folder / "candidate",
            prompts=tuple(prompt.text for prompt in prompts[:PROMPTS]),
            seeds=recipe.compare.seeds,
            sampling=(recipe.sampling, recipe.compare),
            thresholds=recipe.compare.thresholds,
        )
        return compare(request, folder / "report").verdict

    return judge


def test_four_bits_pass_even_when_only_rounded(verdict_of):
    verdict = verdict_of("scheme.iters=0")
    assert {row.metric: row.outcome for row in verdict.rows} == dict.fromkeys(
        ["latent_rel_l2", "psnr", "ssim", "flip"], "PASS"
    )
    assert verdict.outcome == "PASS"


def test_two_bits_fail_even_when_tuned(verdict_of):
    # Of so few prompts the interval of FLIP is too wide to tell.
    verdict = verdict_of("scheme.bits=2", "scheme.iters=20")
    assert verdict.outcome == "FAIL"
    assert {row.metric for row in verdict.rows if row.outcome == "FAIL"} >= {"latent_rel_l2", "psnr", "ssim"}
