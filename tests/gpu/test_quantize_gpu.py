"""The main job on an accelerator: tune the embedded model there, compare it with BF16 there."""

from pathlib import Path

import pytest
import torch

import quantkit.demo
from quantkit.compare.run import Request, compare
from quantkit.quantize.run import prepare, quantize
from quantkit.quantize.verify import verify
from quantkit.recipe import find_prompts, find_recipe, load_recipe, read_prompts

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return str(torch.accelerator.current_accelerator())


@pytest.fixture(scope="module")
def tuned(device, tmp_path_factory) -> Path:
    """The embedded model, tuned on the accelerator."""
    loaded = load_recipe(find_recipe("demo-flux"))
    output = tmp_path_factory.mktemp("tuned") / "demo-w4a16"
    quantize(prepare(loaded, quantkit.demo.path()), output, device=device)
    return output


def test_tuned_on_the_device_it_verifies_against_its_source(tuned):
    result = verify(tuned, source=quantkit.demo.path())
    assert result.problems == []
    # Tuning really happened: some layers are farther from their source than round-to-nearest would be.
    assert any(error.relative_l2 > error.rtn_relative_l2 for error in result.errors)


def test_compared_on_the_device_it_passes_the_recipe(device, tuned, tmp_path):
    loaded = load_recipe(find_recipe("demo-flux"))
    recipe = loaded.recipe
    prompts = read_prompts(find_prompts(recipe.compare.prompts, loaded.path))
    request = Request(
        reference=quantkit.demo.path(),
        candidate=tuned,
        prompts=tuple(prompt.text for prompt in prompts),
        seeds=recipe.compare.seeds,
        sampling=(recipe.sampling, recipe.compare),
        thresholds=recipe.compare.thresholds,
        device=device,
    )
    result = compare(request, tmp_path / "report")
    assert result.verdict.outcome == "PASS"
    assert result.candidate.peak_memory_bytes < result.reference.peak_memory_bytes
