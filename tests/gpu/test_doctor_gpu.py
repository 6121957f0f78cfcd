"""quantkit doctor and compiled pipelines on an accelerator."""

import json

import pytest
import torch
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit_runtime import load_pipeline

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _accelerator():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")


def test_the_accelerator_is_described_and_every_backend_that_runs_passes():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    data = json.loads(result.stdout)
    kind = torch.accelerator.current_accelerator().type
    device = data["devices"][0]
    assert device["name"] == f"{kind}:0"
    assert device["memory_bytes"] > device["free_bytes"] > 0
    assert [check for check in data["self_test"] if check["outcome"] == "FAIL"] == []
    assert any(check["device"] == f"{kind}:0" and check["outcome"] == "PASS" for check in data["self_test"])
    assert result.exit_code == 0


def test_a_compiled_pipeline_draws_what_the_eager_one_does(rtn_checkpoint):
    images = {}
    for compiled in (False, True):
        device = torch.accelerator.current_accelerator()
        pipeline = load_pipeline(rtn_checkpoint, device=device, compile=compiled)
        pipeline.set_progress_bar_config(disable=True)
        images[compiled] = pipeline(
            "a red circle",
            height=32,
            width=32,
            num_inference_steps=2,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images.float()
    assert (images[True] - images[False]).norm() / images[False].norm() < 2e-2
