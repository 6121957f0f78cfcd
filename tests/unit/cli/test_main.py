"""The command line as a whole: help, exit codes, how errors are shown, and what it does not import."""

import errno
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import __version__
from quantkit.cli.main import main
from quantkit.recipe import list_recipes

HEAVY = ["auto_round", "transformers", "diffusers", "triton", "fastapi", "evalscope", "torch", "pydantic", "yaml"]


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


@pytest.mark.parametrize("statement", ["import quantkit", "import quantkit_runtime", "import quantkit.demo"])
def test_an_import_loads_no_heavy_library(statement):
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom quantkit.cli.main import main\nsys.argv = ['quantkit', '--help']\n"
        "try:\n    main()\nfinally:\n"
        f"    print(*[name for name in {HEAVY[:7]} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantize" in done.stdout
    assert done.stderr.split() == []


def test_help_takes_less_than_0_4_seconds():
    """Of the processor, which is what it takes where nothing else runs."""
    command = [str(Path(sys.executable).parent / "quantkit"), "--help"]
    seconds = []
    for _ in range(10):  # the fastest counts: other work on the machine only ever adds to it
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 0.4:
            return
    pytest.fail(f"quantkit --help took {min(seconds):.2f} s at best")


VERBS = [
    *(["quantize"], ["compare"], ["generate"], ["verify"], ["inspect"], ["recipes"]),
    *(["recipes", verb] for verb in ("ls", "show", "cp", "validate")),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_explains_itself(run, verb, flag):
    code, output, _ = run(*verb, flag)
    assert code == 0
    assert f"quantkit {' '.join(verb)}" in " ".join(output.split())


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, f"quantkit {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["quantize"], ["quantize", "-r", "flux", "--nonsense"], ["verify"], ["--nonsense"]]
)
def test_a_mistake_in_the_options_ends_with_code_2(run, arguments):
    code, output, errors = run(*arguments)
    assert code == 2
    assert output == ""
    assert "Usage: quantkit" in errors


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(run, place):
    arguments = ["quantize", "-r", "none.yaml"]
    arguments.insert(place, "--debug")
    code, _, errors = run(*arguments)
    assert code == 2
    assert "Traceback" in errors
    assert "error: none.yaml: no such recipe" in errors


def test_an_error_is_one_line_on_standard_error_with_code_2(run):
    assert run("quantize", "-r", "[red]none") == (
        2,
        "",
        f"error: [red]none: no such recipe (known recipes: {', '.join(list_recipes())})\n",
    )


def test_an_error_of_the_runtime_is_shown_like_ours(run, monkeypatch):
    from quantkit.cli import verify
    from quantkit_runtime.errors import CheckpointFormatError

    def fail(_text):
        raise CheckpointFormatError("config.json: is odd")

    monkeypatch.setattr(verify, "resolve_model", fail)
    assert run("verify", "x") == (2, "", "error: config.json: is odd\n")


def test_recipes_are_listed_shown_checked_and_copied(run, tmp_path):
    from quantkit.recipe import find_recipe

    code, output, _ = run("recipes", "ls")
    assert code == 0
    assert "demo-flux" in output
    code, output, _ = run("recipes", "show", "flux")
    assert (code, "model:" in output) == (0, True)
    assert run("recipes", "cp", "flux", tmp_path)[0] == 0
    assert (tmp_path / "flux.yaml").read_bytes() == find_recipe("flux").read_bytes()
    code, output, _ = run("recipes", "validate", tmp_path / "flux.yaml")
    assert code == 0
    assert output.startswith("ok ")


def test_a_recipe_that_bounds_a_metric_of_another_task_is_not_valid(run, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {id: demo}\nscheme: {iters: 0}\ncompare: {thresholds: {token_kl: {max: 1}}}\n"
    )
    code, _, errors = run("recipes", "validate", recipe)
    assert code == 2
    assert errors.startswith(f"error: {recipe}: compare.thresholds: token_kl: unknown metric (")


@pytest.mark.parametrize("ending", ["\n", "\n\n"])
def test_a_shown_recipe_is_the_file_itself_and_its_path_is_on_standard_error(run, tmp_path, ending):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"version: 1\nmodel: {{id: '[bold]demo[/]'}}  # {'long ' * 60}end{ending}")
    assert run("recipes", "show", recipe) == (0, recipe.read_text(), f"{recipe}\n")


def test_a_shown_recipe_is_not_cropped_on_a_terminal(run, tmp_path, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("quantkit.cli.recipes.output", Console(force_terminal=True, width=40, color_system="256"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"version: 1  # {'long ' * 60}end\n")
    code, output, _ = run("recipes", "show", recipe)
    assert code == 0
    assert "\x1b[" in output
    assert re.sub(r"\x1b\[[\d;]*m", "", output) == recipe.read_text()


def test_a_recipe_that_a_full_disk_cuts_off_is_not_left_behind(run, tmp_path, monkeypatch):
    def fail(_source, target):
        target.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    code, _, errors = run("recipes", "cp", "flux", tmp_path)
    assert (code, errors) == (2, f"error: {tmp_path / 'flux.yaml'}: cannot be written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_a_task_that_its_family_does_not_do_is_told_so_and_nothing_of_its_metrics(run, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {id: demo, family: flux, task: chat}\nscheme: {iters: 0}\n"
        "compare: {thresholds: {psnr: {min: 30}}}\n"
    )
    code, _, errors = run("recipes", "validate", recipe)
    assert (code, errors) == (2, f"error: {recipe}: model.task: recipes of flux say t2i, not chat\n")


def test_a_recipe_is_never_copied_over_a_file(run, tmp_path):
    (tmp_path / "flux.yaml").write_text("mine")
    code, _, errors = run("recipes", "cp", "flux", tmp_path)
    assert (code, errors) == (2, f"error: {tmp_path / 'flux.yaml'}: exists; give another name\n")
    assert (tmp_path / "flux.yaml").read_text() == "mine"
    code, _, errors = run("recipes", "cp", "flux", tmp_path / "none" / "flux.yaml")
    assert (code, errors) == (
        2,
        f"error: {tmp_path / 'none' / 'flux.yaml'}: cannot be written: No such file or directory\n",
    )


def test_one_bad_recipe_on_the_search_path_does_not_hide_the_others(run, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("version: 7")
    monkeypatch.setenv("QUANTKIT_RECIPE_PATH", str(tmp_path))
    code, output, _ = run("recipes", "ls")
    assert code == 0
    assert "flux" in output
    assert "bad" in output


def test_a_sound_checkpoint_passes_verify_and_a_changed_one_fails_with_code_1(
    run, rtn_checkpoint, flux_model, tmp_path
):
    import shutil

    code, output, _ = run("verify", rtn_checkpoint, "--source", flux_model)
    assert (code, output.splitlines()[-1]) == (0, "PASS 40 packed layers, no problem")
    shutil.copytree(rtn_checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("other")
    code, output, _ = run("verify", tmp_path / "copy")
    assert code == 1
    assert f"{tmp_path / 'copy' / 'README.md'}: has changed since it was written" in output
    assert output.splitlines()[-1] == f"FAIL 1 problems in {tmp_path / 'copy'}"


def test_inspect_shows_schemes_and_sizes_also_as_json(run, rtn_checkpoint, flux_model):
    import json

    code, output, _ = run("inspect", rtn_checkpoint)
    assert code == 0
    assert "40 of W4 g64 sym" in output
    code, output, _ = run("inspect", rtn_checkpoint, "--json")
    found = json.loads(output)
    assert {part["name"]: part["schemes"] for part in found["components"]}["transformer"] == {"W4 g64 sym": 40}
    assert found["provenance"]["recipe"]["name"] == "tiny.yaml"
    code, output, _ = run("inspect", flux_model)
    assert (code, "W4" in output) == (0, False)


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, flux_model, tmp_path):
    code, output, _ = run("quantize", "-r", "flux", "-m", flux_model, "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "W4 g128 sym" in output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_memory_that_calibration_will_take(run, flux_model, quantize_tiny):
    code, output, _ = run(
        "quantize", "-r", quantize_tiny.recipe, "-m", flux_model, "--dry-run", "--set", "scheme.iters=1"
    )
    assert code == 0
    assert "Calibration: 2 samples x 2 calls cache 0.33 MB;\ntuning holds up to 0.58 MB" in output


@pytest.mark.parametrize("name", ["123", "1e5", "null", "a: b", "yes", "[x]"])
def test_a_model_folder_may_have_any_name(run, flux_model, tmp_path, name):
    (tmp_path / name).symlink_to(flux_model)
    renamed = tmp_path / "real" / name
    renamed.parent.mkdir()
    (tmp_path / name).rename(renamed)
    code, _, errors = run("quantize", "-r", "flux", "-m", renamed, "--dry-run")
    assert (code, errors) == (0, "")
