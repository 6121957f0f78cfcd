"""``quantkit serve``: what it makes of its options; the server itself is tested with the runtime."""

import shutil
import sys

import pytest

import quantkit.demo
from quantkit.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``quantkit serve`` and return its exit code, what it printed as an error, and the settings it serves."""

    def run_main(*arguments):
        served = []
        monkeypatch.setattr("quantkit_runtime.server.run.serve", served.append)
        monkeypatch.setattr(sys, "argv", ["quantkit", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, " ".join(capsys.readouterr().err.split()), served

    return run_main


def test_the_demo_is_served_with_the_sampling_of_its_recipe(run):
    code, _, [settings] = run(
        "demo", "--device", "cpu", "--port", "0", "--max-batch", "2", "--limit", "max_steps=30"
    )
    assert code == 0
    [(name, spec)] = settings.models.items()
    assert (name, spec.max_batch, spec.cfg_parallel) == ("demo", 2, 1)
    assert spec.path.endswith("pipeline")
    assert (spec.defaults["height"], spec.defaults["width"], spec.defaults["true_cfg_scale"]) == (64, 64, 2.0)
    assert (settings.host, settings.limits.max_steps) == ("127.0.0.1", 30)


def test_the_section_serve_of_a_recipe_is_stronger_than_its_sampling(run, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {id: demo}\nscheme: {iters: 0}\n"
        "sampling: {height: 64, num_inference_steps: 20}\nserve: {num_inference_steps: 7}\n"
    )
    _, _, [settings] = run("demo", "--device", "cpu", "--recipe", recipe)
    defaults = settings.models["demo"].defaults
    assert (defaults["height"], defaults["num_inference_steps"]) == (64, 7)


def test_a_default_on_the_command_line_is_stronger_than_the_recipes(run):
    _, _, [settings] = run("demo", "--device", "cpu", "--default", "num_inference_steps=3")
    assert settings.models["demo"].defaults["num_inference_steps"] == 3


def test_a_broken_manifest_is_told_of_and_the_familys_sampling_served(run, tmp_path):
    model = shutil.copytree(quantkit.demo.path(), tmp_path / "model")
    (model / "quantkit.json").write_text("{}")
    code, errors, [settings] = run(model, "--device", "cpu")
    assert code == 0
    assert f"warning: {model}/quantkit.json: holds no recipe that this version can read: " in errors
    assert settings.models[str(model)].defaults["num_inference_steps"] == 28


def test_a_device_that_is_not_here_is_refused_before_anything_listens(run):
    code, error, served = run("demo", "--device", "cuda:99")
    assert (code, served) == (2, [])
    assert error.startswith("error: device 'cuda:99': not available here (accelerators: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model"], "no such folder"),
        (["demo", "--host", "0.0.0.0"], "give an API key"),
        (["demo", "--limit", "speed=3"], "--limit speed=3: write NAME=VALUE with one of max_queue"),
        (["demo", "--default", "steps"], "--default steps: write FIELD=VALUE"),
        (["demo", "--dtype", "int4"], "--dtype int4: use bfloat16"),
        (["demo", "--log-format", "xml"], "--log-format xml: use json or text"),
        (["demo", "--api-key-file", "/no/such/file"], "--api-key-file /no/such/file: cannot be read"),
        (["demo", "--cfg-parallel", "3"], "--cfg-parallel"),
        (["demo", "--default", "height=tall"], "--default height: input should be a valid integer"),
        (["demo", "--default", "num_inference_steps=0"], "--default num_inference_steps: input should be greater"),
        (["demo", "--default", "height=63"], "--default height: is 63, but this flux model draws multiples of 8;"),
        (["demo", "--port", "70000"], "less than or equal to 65535"),
        (["demo", "--backend", "cublas"], "backend 'cublas' does not exist; use 'auto' or one of: "),
        (["demo", "--compute", "int8"], "compute 'int8' does not exist; use 'auto' or one of ('16bit', 'fp8')"),
        (["demo", "--compute", "fp8"], "compute 'fp8': only for packed layers, and "),
        (["demo", "--backend", "triton"], "backend 'triton': only for packed layers, and "),
        (["demo", "--max-replicas", "3"], "--max-replicas: only --engine ray grows"),
        (["demo", "--ray-address", "auto"], "--ray-address: only --engine ray grows"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_served(run, arguments, words, monkeypatch):
    monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
    code, error, served = run(*arguments, "--device", "cpu")
    assert (code, served) == (2, [])
    assert words in error
