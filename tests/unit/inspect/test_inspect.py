"""``quantkit inspect --servable`` on the command line."""

import json
import sys

import pytest
import torch

from quantkit.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: ``code, standard output = run("inspect", folder)``."""

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run_main


def test_a_checkpoint_that_can_be_served_passes(run, sound):
    code, output, _ = run("inspect", sound["flux"], "--servable", "vllm-omni")
    assert (code, output) == (0, f"PASS vllm-omni: 0 errors, 0 warnings in {sound['flux']}\n")


def test_an_error_fails_with_code_1_and_a_table(run, breakable):
    model = breakable("flux")
    model.set(packing_format="auto_round")
    code, output, _ = run("inspect", model.folder, "--servable", "vllm-omni")
    assert code == 1
    assert "error" in output
    assert "packing-format" in output
    assert output.splitlines()[-1] == f"FAIL vllm-omni: 1 error, 0 warnings in {model.folder}"


def test_a_warning_passes(run, breakable):
    model = breakable("flux-g128")
    model.put({"proj_out.bias": torch.zeros(16)})
    code, output, _ = run("inspect", model.folder, "--servable", "diffusers")
    assert (code, output.splitlines()[-1]) == (0, f"PASS diffusers: 0 errors, 1 warning in {model.folder}")


def test_findings_are_also_json(run, breakable):
    model = breakable("flux")
    model.set(quant_method="gptq")
    code, output, _ = run("inspect", model.folder, "--servable", "vllm-omni", "--json")
    assert code == 1
    found = json.loads(output)
    assert found["target"] == "vllm-omni"
    assert found["findings"] == [
        {
            "rule": "quant-method",
            "severity": "error",
            "model": "transformer",
            "where": "quantization_config.quant_method",
            "count": 1,
            "what": "is 'gptq'",
            "mend": "set it to auto-round or auto_round or inc",
        }
    ]


def test_a_model_that_is_not_quantized_is_the_users_mistake(run, flux_model):
    code, output, errors = run("inspect", flux_model, "--servable", "diffusers")
    assert (code, output) == (2, "")
    assert errors == f"error: {flux_model}: nothing in it has a quantization_config; it is not quantized\n"


def test_an_unknown_engine_is_the_users_mistake(run, sound):
    assert run("inspect", sound["flux"], "--servable", "tgi")[0] == 2


def test_a_quantization_says_which_engine_cannot_load_its_result(run, quantize_tiny, flux_model, tmp_path):
    arguments = ("quantize", "-r", quantize_tiny.recipe, "-m", flux_model, "-o")
    code, output, _ = run(*arguments, tmp_path / "sound")
    assert (code, "cannot load it" in output) == (0, False)
    target = tmp_path / "two-bits"
    code, output, _ = run(*arguments, target, "--set", "scheme.bits=2")
    assert code == 0
    assert f"vllm-omni cannot load it (1 error): quantkit inspect {target} --servable vllm-omni" in output
    assert run("inspect", target, "--servable", "vllm-omni")[0] == 1


@pytest.mark.parametrize("manifest", ["{}", '{"created": 1, "recipe": "x", "source": null}'])
def test_a_manifest_that_lost_its_content_is_told_of_below_the_table(run, breakable, manifest):
    model = breakable("flux")
    path = model.folder / "quantkit.json"
    path.unlink()
    path.write_text(manifest)
    code, output, told = run("inspect", model.folder)
    assert (code, told) == (0, f"warning: {path}: does not say what the checkpoint was made from\n")
    assert "transformer" in output
