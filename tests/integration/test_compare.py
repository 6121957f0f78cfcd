"""Comparing real, tiny FLUX pipelines through the runtime's own loader and through the command line."""

import json
import re
import shlex
import shutil

import pytest
import torch
from tiny import build_flux
from tiny.perturb import perturb

from quantkit.compare.request import Request
from quantkit.compare.run import compare
from quantkit.recipe.schema import Sampling, Threshold

PROMPTS = ("a red circle on the left", "a blue square on white")
SAMPLING = Sampling(
    height=16,
    width=16,
    num_inference_steps=4,
    true_cfg_scale=2.0,
    negative_prompt="black",
    max_sequence_length=16,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.set_num_threads(1)
    return build_flux(tmp_path_factory.mktemp("models") / "reference")


@pytest.fixture(scope="module")
def slight(reference):
    return perturb(reference, reference.parent / "slight", 0.02)


@pytest.fixture(scope="module")
def strong(reference):
    return perturb(reference, reference.parent / "strong", 0.5)


@pytest.fixture(scope="module")
def results(reference, slight, strong, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return {
        candidate.name: compare(
            Request(
                reference, candidate, PROMPTS, (0, 1), sampling=(SAMPLING,), device="cpu",
                thresholds={"latent_rel_l2": Threshold(max=0.1)},
            ),
            folder / candidate.name,
        )
        for candidate in (reference, slight, strong)
    }  # fmt: skip


def test_a_pipeline_compared_with_itself_is_exactly_equal(results, shows):
    result = results["reference"]
    assert result.verdict.outcome == "PASS"
    assert {value for item in result.items for value in item.curves["latent_rel_l2"]} == {0.0}
    assert result.metrics["psnr"].value == 100
    assert result.metrics["weight_memory_ratio"].value == 1
    assert max(result.noise_floor.curves["latent_rel_l2"]) == 0
    shows("flux", "compare")


def test_more_perturbed_weights_diverge_more_at_every_step(results):
    slight, strong = (results[name].curves["latent_rel_l2"].median for name in ("slight", "strong"))
    assert all(0 < less < more for less, more in zip(slight, strong, strict=True))
    assert results["slight"].verdict.outcome == "PASS"
    assert results["strong"].verdict.outcome == "FAIL"


def test_the_recorded_steps_are_those_of_the_scheduler(results):
    result = results["slight"]
    assert result.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert len(result.timesteps) == 4
    assert list(result.timesteps) == sorted(result.timesteps, reverse=True)


def test_what_both_models_take_is_measured(results):
    side = results["slight"].reference
    assert side.weight_bytes.keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert side.disk_bytes["transformer"] >= side.weight_bytes["transformer"] > 100_000
    assert side.step_ms.count == 4 * 3
    assert side.peak_memory_bytes is not None


@pytest.mark.parametrize("name", ["glm_image", "ovis_image"])
def test_other_families_of_images_are_compared_without_anything_of_their_own(tiny_model, tmp_path, name, shows):
    source = tiny_model(name)
    asked = Sampling(height=64, width=64, num_inference_steps=2)
    candidate = perturb(source, tmp_path / "candidate", 0.2)
    request = Request(source, candidate, PROMPTS[:1], (0,), sampling=(asked,), device="cpu")
    result = compare(request, tmp_path / "result")
    assert max(result.noise_floor.curves["latent_rel_l2"]) == 0
    assert all(value > 0 for value in result.items[0].curves["latent_rel_l2"])
    assert len(result.timesteps) == 2
    shows(result.family, "compare")


@pytest.fixture
def quantkit(monkeypatch, capfd):
    """Run the command line in this process; return exit code, standard output and standard error."""

    def run(*arguments):
        from quantkit.cli.main import main

        monkeypatch.setattr("sys.argv", ["quantkit", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


FLAGS = (
    "--task", "t2i", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--seeds", "3,4", "--height", "16",
    "--width", "16", "--num-inference-steps", "2", "--max-sequence-length", "16", "--device", "cpu",
)  # fmt: skip
RECIPE = """
version: 1
model: {{id: {reference}, family: flux}}
scheme: {{iters: 0}}
sampling: {{height: 16, width: 16, num_inference_steps: 9, max_sequence_length: 16}}
compare:
  prompts: prompts.txt
  seeds: [5]
  num_inference_steps: 2
  thresholds: {{latent_rel_l2: {{max: {bound}}}}}
"""


@pytest.fixture
def recipe(reference, tmp_path):
    def write(bound):
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        (tmp_path / "mine.yaml").write_text(RECIPE.format(reference=reference, bound=bound))
        return tmp_path / "mine.yaml"

    return write


def test_the_command_line_ends_with_the_verdict_and_the_reports_path(quantkit, reference, slight, tmp_path):
    code, out, _ = quantkit(
        "compare", "--reference", reference, "--candidate", slight, "--output", tmp_path / "out", *FLAGS
    )
    assert code == 0
    assert re.search(r"psnr\s+[\d.]+ dB", out)
    assert out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["seeds"] == [3, 4]
    assert result["command"][:2] == ["quantkit", "compare"]
    assert (result["reference"]["label"], result["candidate"]["label"]) == ("reference", "slight")


@pytest.mark.parametrize(("bound", "gate", "code"), [(0.9, True, 0), (1e-6, True, 1), (1e-6, False, 0)])
def test_the_recipes_thresholds_decide_the_exit_code_with_gate_alone(
    quantkit, recipe, slight, tmp_path, bound, gate, code
):
    ended, out, _ = quantkit(
        "compare", "--recipe", recipe(bound), "--candidate", slight, "--output", tmp_path / "out",
        "--device", "cpu", *(["--gate"] if gate else []),
    )  # fmt: skip
    assert ended == code
    assert ("PASS" in out) == (bound == 0.9)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [prompt["text"] for prompt in result["prompts"]] == list(PROMPTS)
    assert (result["seeds"], len(result["timesteps"])) == ([5], 2)


def test_flags_win_over_the_recipe(quantkit, recipe, slight, tmp_path):
    code, out, _ = quantkit(
        "compare", "--recipe", recipe(0.9), "--candidate", slight, "--output", tmp_path / "out", "--device", "cpu",
        "--prompt", "a circle", "--seeds", "8", "--num-inference-steps", "3",
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert code == 0
    assert result["prompts"] == [{"text": "a circle", "image": None, "audio": None}]
    assert (result["seeds"], len(result["timesteps"])) == ([8], 3)
    # One prompt has a mean, but no interval, and the table says so.
    [row] = [line for line in out.splitlines() if line.startswith("latent_rel_l2 ")]
    assert re.fullmatch(r"latent_rel_l2 +[\d.]+ +- +\S 0.9 +PASS", row.strip())
    assert re.search(r"^latent_rel_l2: [\d.]+ meets \S 0.9; single prompt: no interval$", out, re.MULTILINE)


def test_the_command_that_quantize_names_compares_what_it_made(quantkit, recipe, reference, tmp_path):
    code, out, _ = quantkit(
        "quantize", "--recipe", recipe(0.9), "--model", reference, "--output", tmp_path / "w4 a16",
        "--set", "scheme.group_size=64", "--set", "compare.seeds=[7]",
    )  # fmt: skip
    assert code == 0
    line = out.splitlines()[-1]
    assert line.startswith("next: quantkit compare --task t2i --reference ")
    code, out, _ = quantkit(*shlex.split(line)[2:])
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "w4 a16-report" / "report.html")
    assert json.loads((tmp_path / "w4 a16-report" / "result.json").read_text())["seeds"] == [7]


def test_an_undecided_comparison_exits_with_3(quantkit, reference, slight, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "undecided.yaml").write_text(
        RECIPE.format(reference=reference, bound=1).replace("latent_rel_l2: {max: 1}", "lpips: {max: 1}")
    )
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    code, out, _ = quantkit(
        "compare", "--recipe", tmp_path / "undecided.yaml", "--candidate", slight, "--output", tmp_path / "out",
        "--device", "cpu", "--gate",
    )  # fmt: skip
    assert code == 3
    assert "not measured" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "-1"], "--height: "),
        (["--seeds", "1,x"], "--seeds: '1,x' is no list"),
        (["--task", "t2x"], "--task: 't2x' is unknown"),
        (["--prompts", "missing.txt"], "give one of the two"),
        (["--image", "missing.png"], "prompts: 0: has an image, which t2i takes none of"),
        (["--task", "chat"], "task chat: the family flux does t2i"),
        (["--max-new-tokens", "9"], "flux takes no max_new_tokens"),
        (["--device", "toaster"], "device: 'toaster'"),
        (["--backend", "nonsense"], "backend 'nonsense' does not exist"),
        (["--compute", "int8"], "compute 'int8' does not exist; use 'auto' or one of ('16bit', 'fp8')"),
        (["--candidate", "nowhere"], "nowhere: no such folder"),
        (["--recipe", "no-such"], "no-such: no such recipe"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(quantkit, reference, slight, tmp_path, arguments, message):
    code, out, err = quantkit(
        "compare",
        "--reference",
        reference,
        "--candidate",
        slight,
        "--output",
        tmp_path / "out",
        *FLAGS,
        *arguments,
    )
    assert code == 2
    assert [message in line for line in err.splitlines() if line.startswith("error:")] == [True]
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["source", "org/source"])
def test_a_recorded_name_of_a_local_source_is_not_looked_for_in_the_current_folder(
    quantkit, reference, slight, tmp_path, monkeypatch, name
):
    candidate = shutil.copytree(slight, tmp_path / "candidate")
    effective = {"version": 1, "model": {"id": name}, "scheme": {"iters": 0}}
    (candidate / "quantkit.json").write_text(json.dumps({"recipe": {"effective": effective, "sha256": "0"}}))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(reference)
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--candidate", candidate, "--output", "out", *FLAGS]
    code, _, err = quantkit(*arguments)
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith(f"error: --reference: {candidate}/quantkit.json says ")
    assert f"'{name}'" in line
    code, _, err = quantkit(*arguments, "--reference", name)
    assert code == 0, err


def test_a_reference_that_is_the_candidate_is_refused_through_links_too(quantkit, reference, tmp_path):
    (tmp_path / "link").symlink_to(reference)
    code, _, err = quantkit(
        "compare", "--reference", reference, "--candidate", tmp_path / "link", "--output", tmp_path / "out", *FLAGS
    )
    assert code == 2
    assert err.startswith(f"error: --reference: {reference} is the candidate itself")
    assert not (tmp_path / "out").exists()


def test_a_reference_that_is_quantized_is_warned_of(quantkit, flux_model, rtn_checkpoint, tmp_path):
    arguments = ["compare", "--output", tmp_path / "out", *FLAGS]
    code, _, err = quantkit(*arguments, "--reference", rtn_checkpoint, "--candidate", flux_model)
    assert code == 0, err
    assert "warning: the reference is itself quantized (transformer: W4A16, group 64, symmetric)" in err
    _, _, err = quantkit(*arguments, "--reference", flux_model, "--candidate", rtn_checkpoint, "--overwrite")
    assert "warning" not in err


def test_a_candidate_whose_manifest_is_broken_is_refused(quantkit, reference, tmp_path):
    candidate = shutil.copytree(reference, tmp_path / "candidate")
    (candidate / "quantkit.json").write_text("{")
    code, _, err = quantkit("compare", "--candidate", candidate, "--output", tmp_path / "out", "--device", "cpu")
    assert code == 2
    assert "quantkit.json: holds no recipe that this version can read" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "triton"], "backend 'triton' cannot run here: it needs the weights on a CUDA or XPU device"),
        (["--compute", "fp8"], "no backend serves linear with compute 'fp8' on cpu"),
    ],
)
def test_packed_layers_without_a_kernel_are_refused_before_the_reference_runs(
    quantkit, flux_model, rtn_checkpoint, tmp_path, arguments, message, monkeypatch
):
    monkeypatch.setattr("quantkit.compare.run.Sampler", None)
    options = [
        "--reference",
        flux_model,
        "--candidate",
        rtn_checkpoint,
        "--output",
        tmp_path / "out",
        "--prompt",
        "x",
    ]
    code, _, err = quantkit("compare", *options, "--device", "cpu", *arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_compute_mode_and_backend_go_to_the_model_with_packed_layers_and_are_recorded(
    flux_model, rtn_checkpoint, tmp_path, monkeypatch
):
    import quantkit_runtime

    load, asked = quantkit_runtime.load_pipeline, []

    def recording(*arguments, **options):
        asked.append((options.get("compute"), options.get("backend")))
        return load(*arguments, **options)

    monkeypatch.setattr(quantkit_runtime, "load_pipeline", recording, raising=False)
    request = Request(
        flux_model, rtn_checkpoint, PROMPTS[:1], (0,), sampling=(SAMPLING,), device="cpu", compute="16bit",
        backend="reference",
    )  # fmt: skip
    result = compare(request, tmp_path / "result")
    assert asked == [(None, None), ("16bit", "reference")]
    assert result.compute == "16bit"
    assert "compute 16bit" in (tmp_path / "result" / "report.html").read_text(encoding="utf-8")


def test_a_model_of_another_width_is_refused_in_one_line(quantkit, reference, tmp_path):
    other = build_flux(tmp_path / "other", heads=2)
    code, _, err = quantkit(
        "compare", "--reference", reference, "--candidate", other, "--output", tmp_path / "out", *FLAGS
    )
    assert code == 2
    assert "transformer.num_attention_heads 4 against 2" in err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
