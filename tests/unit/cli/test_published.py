"""Dry runs and lists of models whose weights are not here."""

import shutil
import socket
import subprocess
import sys

import pytest

from quantkit.cli import models
from quantkit.cli.main import main

HUB_ID = "black-forest-labs/FLUX.1-dev"
FROM_CONFIGURATION = "no weights here: planned from the published configuration"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: ``code, standard output, standard error = run("recipes", "ls")``."""

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run_main


@pytest.fixture
def cached(tmp_path, monkeypatch, flux_model):
    """Empty the hub's cache and forbid the network; call it to put a complete download there."""
    import huggingface_hub

    def refuse(*_):
        raise OSError("the network is forbidden here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def download():
        repository = tmp_path / f"models--{HUB_ID.replace('/', '--')}"
        shutil.copytree(flux_model, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        return repository / "snapshots" / "abc"

    return download


@pytest.mark.usefixtures("cached")
def test_a_dry_run_needs_no_weights(run):
    code, output, errors = run("quantize", "-r", "flux", "--dry-run")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[:2] == [FROM_CONFIGURATION, f"Plan: {HUB_ID}"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}
    assert rows["transformer"] == "W4 g128 sym 494 11.90 B 23.80 GB 6.28 GB 0.26"
    assert rows["all"] == "16.87 B 33.74 GB 16.22 GB 0.48"


@pytest.mark.usefixtures("cached")
def test_its_table_fits_a_terminal_of_80_columns(run):
    _, output, _ = run("quantize", "-r", "glm-image", "--dry-run")
    assert any(line.startswith("vision_language_encoder  ") for line in output.splitlines())
    table = [
        line for line in output.splitlines() if not line.startswith("Calibration: ")
    ]  # a sentence, which wraps
    assert max(map(len, table)) <= 80


def test_a_complete_download_is_planned_as_it_is(run, cached):
    folder = cached()
    code, output, _ = run("quantize", "-r", "flux", "--dry-run")
    assert (code, FROM_CONFIGURATION in output) == (0, False)
    assert f"Plan: {folder}" in output


@pytest.mark.parametrize("missing", ["transformer/diffusion_pytorch_model.safetensors", "vae"])
def test_an_interrupted_download_is_planned_from_the_configuration(run, cached, missing):
    path = cached() / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, output, _ = run("quantize", "-r", "flux", "--dry-run")
    assert (code, output.splitlines()[0]) == (0, FROM_CONFIGURATION)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("arguments", [("-r", "flux"), ("-r", "flux", "-m", "someone/other", "--dry-run")])
def test_a_run_and_an_unknown_model_want_the_weights(run, monkeypatch, arguments):
    wanted = []

    def download(hub_id, revision):
        wanted.append((hub_id, revision))
        raise models.CheckpointError("cannot be downloaded")

    monkeypatch.setattr(models, "_download", download)
    assert run("quantize", *arguments) == (2, "", "error: cannot be downloaded\n")
    assert wanted == [(arguments[3] if "-m" in arguments else HUB_ID, None)]


def test_recipes_are_listed_with_the_sizes_of_their_plans(run, tmp_path, monkeypatch):
    (tmp_path / "flux-w8.yaml").write_text(
        f"version: 1\nmodel: {{id: {HUB_ID}, family: flux}}\nscheme: {{bits: 8, iters: 0}}\n"
    )
    monkeypatch.setenv("QUANTKIT_RECIPE_PATH", str(tmp_path))
    code, output, _ = run("recipes", "ls")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["flux"][-4:] == ["33.74", "GB", "16.22", "GB"]
    assert rows["flux-w8"][-2:] == ["?", "?"]


def test_listing_recipes_builds_no_model():
    code = (
        "import sys\nfrom quantkit.cli.main import main\nsys.argv = ['quantkit', 'recipes', 'ls']\n"
        "try:\n    main()\nfinally:\n    print(*{'torch', 'diffusers', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
