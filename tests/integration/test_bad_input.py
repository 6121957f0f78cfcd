"""Bad input through the real command line: one clear line, exit code 2, nothing left behind."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from quantkit.cli.main import main

RECIPE = """\
version: 1
model: {id: tiny, family: flux}
scheme: {group_size: 64, iters: 0}
"""
TUNED = """\
version: 1
model: {id: tiny, family: flux}
scheme: {group_size: 64, iters: 1, nsamples: 2}
calibration: {prompts: prompts.txt}
"""


@pytest.fixture
def model(flux_model, tmp_path):
    """A copy of the tiny pipeline that a test may damage."""
    return shutil.copytree(flux_model, tmp_path / "model")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Run ``quantkit quantize`` on a recipe's text; return its one line, with the folder as ``.``."""

    def run(recipe, model, *options, output="out"):
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(recipe)
        before = listing(tmp_path)
        arguments = [
            "--recipe",
            tmp_path / "recipe.yaml",
            "--model",
            model,
            "--output",
            tmp_path / output,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", ["quantkit", "quantize", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert listing(tmp_path) == before
        progress = re.compile(r"[a-z ]+: \d+/\d+ in [0-9 minhs]+")
        lines = [line for line in capsys.readouterr().err.splitlines() if not progress.fullmatch(line)]
        assert len(lines) == 1, lines
        return lines[0].replace(f"{tmp_path}/", "./").removeprefix("error: ")

    return run


def listing(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir())


def test_a_missing_recipe(fails, model):
    assert fails(None, model).startswith("./recipe.yaml: no such recipe (")


def test_a_yaml_syntax_error(fails, model):
    assert fails(RECIPE + "layers: {include: [a\n", model).startswith("./recipe.yaml:5: is not valid YAML: ")


def test_an_unknown_key(fails, model):
    assert fails(RECIPE + "exprt: {}\n", model) == "./recipe.yaml:4: exprt: unknown key (did you mean export?)"


def test_a_wrong_type(fails, model):
    assert fails(RECIPE + "export: {max_shard_size: 5}\n", model) == (
        "./recipe.yaml:4: export.max_shard_size: input should be a valid string, not 5"
    )


def test_a_group_size_that_divides_no_layer(fails, model):
    line = fails(RECIPE, model, "--set", "scheme.group_size=100")
    assert line.startswith(
        "scheme.group_size: 100 does not divide in_features 128 of transformer_blocks.0.norm1.linear; "
    )
    assert "choose 32 or 64 or 128, or exclude it" in line


@pytest.mark.parametrize("section", ["sampling", "calibration", "compare", "serve"])
def test_a_size_that_the_model_cannot_draw(fails, model, section):
    assert fails(f"{RECIPE}{section}: {{height: 62}}\n", model) == (
        f"./recipe.yaml: {section}.height: is 62, but this flux model draws multiples of 4; use 60 or 64"
    )


def test_a_model_folder_without_model_index(fails, model):
    (model / "model_index.json").unlink()
    assert fails(RECIPE, model) == (
        "./model: has neither model_index.json nor config.json; give the root of a diffusers pipeline or "
        "transformers model"
    )


def test_a_model_folder_that_does_not_exist(fails, tmp_path):
    assert fails(RECIPE, tmp_path / "none") == "./none: no such folder"


def test_a_model_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").touch()
    assert fails(RECIPE, tmp_path / "file") == "./file: is a file; give the root folder of a model"


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_truncated_weights(fails, model, component):
    path = model / component / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    line = fails(RECIPE, model)
    assert line.startswith(f"./model/{component}/diffusion_pytorch_model.safetensors: is truncated: ")
    assert line.endswith("copy it again")


@pytest.mark.parametrize(
    "lost",
    ["vae/config.json", "text_encoder/config.json", "transformer/config.json", "scheduler/scheduler_config.json"],
)
def test_a_component_without_its_config(fails, model, lost):
    (model / lost).rename(model / lost.replace("config", "other"))
    assert fails(RECIPE, model) == f"./model/{lost}: is missing; download the model again"


def test_a_tokenizer_without_any_vocabulary(fails, model):
    for path in [*model.glob("tokenizer/*")]:
        path.unlink()
    (model / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert fails(RECIPE, model) == "./model/tokenizer/tokenizer.json: is missing; download the model again"


def test_a_component_without_its_weights(fails, model):
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert fails(RECIPE, model) == "./model/vae: has a config.json but no weights; download the model again"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "proj_out.weight"),
        ("transformer", "single_transformer_blocks.1.proj_out.weight"),
        ("vae", "decoder.conv_out.bias"),
    ],
)
def test_weights_with_nan_or_infinity(fails, model, value, component, name):
    from safetensors.torch import load_file, save_file

    path = model / component / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[1] = value
    save_file(tensors, path)
    assert fails(RECIPE, model) == (
        f"./model/{component}/diffusion_pytorch_model.safetensors: {name}: "
        "holds NaN or infinity; copy the model again"
    )


def test_an_output_whose_parent_is_a_file(fails, model, tmp_path):
    (tmp_path / "file").touch()
    assert fails(RECIPE, model, output="file/out").startswith("./file/out: is no usable path: ")


def test_an_output_where_nothing_can_be_made(fails, model):
    line = fails(RECIPE, model, output="/proc/quantkit-test/out")
    assert line.startswith("/proc/quantkit-test/out: is no usable path: ")


def test_an_output_that_exists(fails, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    assert fails(RECIPE, model) == "./out: exists; give another --output or --overwrite"


def test_an_output_that_is_the_model_or_holds_it(fails, model):
    line = "holds the model that is to be quantized; give another --output"
    assert fails(RECIPE, model, "--overwrite", output="model") == f"./model: {line}"
    assert fails(RECIPE, model, "--overwrite", output="model/..").endswith(line)
    assert (model / "model_index.json").is_file()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own beside the model, of a given size."""
    mounted = []

    def mount(nbytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount file systems here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small(fails, model, small_disk):
    small_disk("1m")
    line = fails(RECIPE, model, output="disk/out")
    assert line == "./disk/out: needs 0.02 GB of free space, has 0.00 GB; free some or give another --output"


def test_a_disk_that_fills_up_while_writing(fails, model, small_disk, monkeypatch):
    monkeypatch.setattr("quantkit.quantize.run._SLACK_BYTES", -(10**7))
    small_disk("800k")
    assert fails(RECIPE, model, output="disk/out") == "./disk/out: cannot be written: No space left on device"


def test_a_device_that_is_not_here(fails, model):
    line = fails(RECIPE, model, "--device", "cuda:99")
    assert line.startswith("--device: cuda:99 is not here; this machine has cpu")


def test_several_devices_for_a_model_that_is_tuned_on_one(fails, model, monkeypatch):
    monkeypatch.setattr("quantkit.quantize.run.resolve_devices", lambda text: tuple(text.split(",")))
    line = fails(RECIPE, model, "--device", "cuda:0,cuda:1")
    assert line == "--device: auto-round tunes a flux model on one device; give one of them"


def test_an_unknown_family(fails, model):
    assert fails(RECIPE.replace("family: flux", "family: fluxx"), model) == (
        "model.family: fluxx is unknown (did you mean flux?)"
    )


def test_a_model_of_no_known_family(fails, model):
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "OtherPipeline"}))
    assert fails(RECIPE, model).startswith("./model: no family knows OtherPipeline (known: ")


def test_a_task_that_the_family_does_not_do(fails, model):
    line = fails(RECIPE, model, "--set", "model.task=t2v")
    assert line == "./recipe.yaml: model.task: recipes of flux say t2i, not t2v"


def test_a_threshold_on_a_metric_that_does_not_exist(fails, model):
    line = fails(RECIPE + "compare: {thresholds: {pnsr: {min: 30}}}\n", model)
    assert line == "./recipe.yaml: compare.thresholds: pnsr: unknown metric (did you mean 'psnr'?)"
    given = "compare.thresholds={pnsr: {min: 3}}"
    line = fails(RECIPE, model, "--set", given)
    assert line.startswith(f"./recipe.yaml, with --set {given}: compare.thresholds: pnsr: unknown metric (")


def test_a_missing_prompt_file(fails, model):
    assert fails(TUNED, model).startswith("./recipe.yaml: prompts: no file prompts.txt (looked for ./prompts.txt, ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "./prompts.txt: holds no prompt"),
        ("one\n", "./prompts.txt: holds 1 prompts, scheme.nsamples asks for 2; add some or lower it"),
    ],
)
def test_a_prompt_file_with_too_few_prompts(fails, model, tmp_path, text, line):
    (tmp_path / "prompts.txt").write_text(text)
    assert fails(TUNED, model) == line


def test_a_model_that_is_quantized_already(fails, rtn_checkpoint):
    line = fails(RECIPE, rtn_checkpoint)
    assert line.endswith("transformer/config.json: is quantized already; give the 16-bit original")


def test_a_sampling_key_that_the_family_does_not_take(fails, model):
    assert fails(RECIPE + "sampling: {num_frames: 8}\n", model).startswith(
        "sampling: flux takes no num_frames (it takes "
    )


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_damaged_checkpoint_is_one_line_for_the_other_verbs_too(
    rtn_checkpoint, tmp_path, monkeypatch, capsys, verb
):
    folder = shutil.copytree(rtn_checkpoint, tmp_path / "checkpoint")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(sys, "argv", ["quantkit", verb, str(folder)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: is truncated or no safetensors file; copy it again\n"


def test_a_source_that_is_quantized_itself_is_no_original(rtn_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantkit", "verify", str(rtn_checkpoint), "--source", str(rtn_checkpoint)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    config = rtn_checkpoint / "transformer" / "config.json"
    assert capsys.readouterr().err == f"error: {config}: the source is quantized itself; give the 16-bit original\n"


@pytest.mark.parametrize("verb", ["verify", "compare"])
def test_packed_weights_whose_config_was_lost_are_found_before_anything_runs(
    rtn_checkpoint, flux_model, tmp_path, monkeypatch, capsys, verb
):
    folder = shutil.copytree(rtn_checkpoint, tmp_path / "checkpoint")
    config = folder / "transformer" / "config.json"
    config.unlink()
    monkeypatch.setattr("quantkit.compare.run.Sampler", None)
    compare = ["--reference", flux_model, "--candidate", folder, "--output", tmp_path / "out", "--prompt", "x"]
    arguments = [folder] if verb == "verify" else compare
    monkeypatch.setattr(sys, "argv", ["quantkit", verb, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = f"error: {config}: has no quantization_config, but the weights are packed; copy the checkpoint again\n"
    assert capsys.readouterr().err == told
