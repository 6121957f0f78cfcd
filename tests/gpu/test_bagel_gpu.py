"""BAGEL on an accelerator gives what it gives on the CPU."""

from pathlib import Path

import pytest
import tiny_bagel
import torch

from quantkit.quantize.run import prepare, quantize
from quantkit.recipe import load_recipe
from quantkit_runtime import load_pipeline
from quantkit_runtime.generation.batch import write_greedily

pytestmark = pytest.mark.gpu

RECIPE = Path(__file__).parents[2] / "recipes" / "bagel.yaml"


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return torch.accelerator.current_accelerator()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    home = tmp_path_factory.mktemp("bagel")
    source = tiny_bagel.build_bagel(home / "source")
    recipe = load_recipe(RECIPE, ["scheme.group_size=64"])
    return quantize(prepare(recipe, source), home / "packed").output


@torch.no_grad()
def test_logits_answers_and_pictures_are_those_of_the_cpu_within_rounding(packed, device):
    here, there = (load_pipeline(packed, device=place, dtype=torch.float32) for place in ("cpu", device))
    parts = ["what is on the left", "red circle"]
    inputs = here.processor(parts)
    writers = [pipe.transformer.bagel.make_writer(pipe.processor.tokenizer) for pipe in (here, there)]
    expected, found = (writer.read(inputs).logits_V.cpu() for writer in writers)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    written = [
        [piece.token for piece in write_greedily(writer, here.processor.tokenizer, inputs, 8)] for writer in writers
    ]
    assert written[0][0] == written[1][0]
    assert len(written[1]) <= 8
    drawn = [
        pipe(
            "draw a red circle", 32, 32, 5, generator=torch.Generator().manual_seed(1), output_type="latent"
        ).images
        for pipe in (here, there)
    ]
    assert drawn[1].device.type == device.type
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=1e-2, atol=1e-2)
