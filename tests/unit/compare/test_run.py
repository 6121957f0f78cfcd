import errno
import json

import numpy as np
import pytest
from PIL import Image

from quantkit.compare.report import render
from quantkit.compare.request import Request
from quantkit.compare.result import read_result
from quantkit.compare.run import compare
from quantkit.errors import CheckpointError, OutputError, QuantkitError, RecipeError, UnsupportedModelError
from quantkit.recipe.schema import Sampling, Threshold
from quantkit_runtime.errors import BackendUnavailableError

PROMPTS = ("a red disc", "a blue disc", "a green disc")
SMALL = Sampling(height=32, width=32, num_inference_steps=6)
LOOSE = {"psnr": Threshold(min=20), "latent_rel_l2": Threshold(max=0.5)}


@pytest.fixture
def run(tmp_path):
    def call(reference, candidate, output="out", *, overwrite=False, on_progress=None, **changes):
        settings = {"prompts": PROMPTS, "seeds": (0, 1), "sampling": (SMALL,), "thresholds": LOOSE, "device": "cpu"}
        request = Request(reference, candidate, **(settings | changes))
        return compare(request, tmp_path / output, overwrite=overwrite, on_progress=on_progress)

    return call


def test_a_model_compared_with_itself_is_exactly_equal(model, run):
    result = run(model("a"), model("b"))
    assert result.verdict.outcome == "PASS"
    assert {value for item in result.items for curve in item.curves.values() for value in curve} == {0.0}
    assert result.metrics["psnr"].value == 100
    assert result.metrics["ssim"].value == 1
    assert result.noise_floor.curves["latent_rel_l2"] == (0,) * 6
    assert result.noise_floor.metrics["psnr"] == 100


def test_a_larger_error_diverges_more_at_every_step(model, run):
    reference = model("a")
    slight = run(reference, model("b", error=0.05), "slight")
    strong = run(reference, model("c", error=0.2), "strong")
    assert np.all(np.array(strong.curves["latent_rel_l2"].median) > np.array(slight.curves["latent_rel_l2"].median))
    for name, better in {"psnr": 1, "ssim": 1, "flip": -1, "mae": -1, "latent_cosine": 1}.items():
        assert better * slight.metrics[name].value > better * strong.metrics[name].value, name


def test_divergence_is_measured_against_an_independent_calculation(model, run, pipeline):
    result = run(model("a"), model("b", error=0.1), prompts=PROMPTS[:1], seeds=(3,))
    latents = []
    for error in (0.0, 0.1):
        steps = []
        pipeline(error=error)(
            prompt=PROMPTS[0],
            generator=__import__("torch").Generator().manual_seed(3),
            callback_on_step_end=lambda _p, _s, _t, tensors, steps=steps: steps.append(tensors["latents"].numpy()),
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="np",
            height=32, width=32, num_inference_steps=6,
        )  # fmt: skip
        latents.append(np.array(steps, np.float64).reshape(6, -1))
    reference, candidate = latents
    expected = np.linalg.norm(candidate - reference, axis=1) / np.linalg.norm(reference, axis=1)
    assert result.items[0].curves["latent_rel_l2"] == pytest.approx(expected, rel=1e-6)


def test_thresholds_decide_the_verdict(model, run):
    reference, candidate = model("a"), model("b", error=0.1)
    metrics = run(reference, candidate).metrics
    bound = metrics["flip"].value
    assert run(reference, candidate, "p", thresholds={"flip": Threshold(max=2 * bound)}).verdict.outcome == "PASS"
    assert run(reference, candidate, "f", thresholds={"flip": Threshold(max=bound / 2)}).verdict.outcome == "FAIL"
    middle = run(reference, candidate, "i", thresholds={"flip": Threshold(max=bound)})
    assert middle.verdict.outcome == "INCONCLUSIVE"


def test_without_thresholds_the_built_in_ones_are_used_and_named(model, run):
    result = run(model("a"), model("b"), thresholds=None)
    assert {row.metric for row in result.verdict.rows} == {"psnr", "mae", "image_cosine", "image_rel_l2"}
    assert result.thresholds_source.startswith("built in")


def test_the_output_holds_the_report_the_result_and_all_images(model, run, tmp_path):
    result = run(model("a"), model("b", error=0.1))
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {"images", "report.html", "result.json"}
    for item in result.items:
        for name in (item.output.reference, item.output.candidate, item.output.difference):
            with Image.open(output / name) as image:
                assert image.size == (32, 32)
    assert len(list((output / "images").iterdir())) == 3 * len(result.items)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_result_and_the_images_alone_make_the_same_report_again(model, run, tmp_path):
    result = run(model("a"), model("b", error=0.1))
    output = tmp_path / "out"
    again = read_result(output)
    assert again == result
    assert render(again, output) == (output / "report.html").read_text()


def test_latents_that_are_not_finite_fail_and_are_never_scored(model, run):
    result = run(model("a"), model("b", bad_from_step=3))
    assert result.verdict.outcome == "FAIL"
    assert "latents are not finite from step 4 of 6" in result.verdict.reason
    assert result.metrics.keys() <= {"weight_memory_ratio", "peak_memory_ratio"}
    assert all(len(item.curves["latent_rel_l2"]) == 3 and item.metrics == {} for item in result.items)


def test_an_image_that_is_not_finite_fails_as_well(model, run):
    result = run(model("a"), model("b", bad_image=True))
    assert result.verdict.outcome == "FAIL"
    assert "decoded image is not finite" in result.verdict.reason


def test_a_reference_that_is_not_finite_is_an_error(model, run, tmp_path):
    with pytest.raises(
        CheckpointError, match=r'the reference cannot be compared with.*prompt 0 "a red disc", seed 0'
    ):
        run(model("a", bad_from_step=0), model("b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_different_noise_is_an_error_and_no_divergence(model, run):
    with pytest.raises(CheckpointError, match="different noise"):
        run(model("a"), model("b", noise_offset=1.0))


def test_weights_and_time_of_both_models_are_measured(model, run):
    result = run(model("a"), model("b", error=0.1))
    assert result.reference.weight_bytes == {"transformer": 1024}
    assert result.candidate.weight_bytes == {"transformer": 256}
    assert result.metrics["weight_memory_ratio"].value == 0.25
    assert result.candidate.quantization == {"transformer": "W4A16, group 128, symmetric"}
    # The first of the six steps of each of the six images is left out.
    assert result.reference.step_ms.count == result.candidate.step_ms.count == 30


@pytest.mark.parametrize(("prompts", "steps"), [(3, 1), (1, 2), (2, 2)])
def test_a_ratio_of_fewer_than_three_timed_steps_is_unavailable_and_undecided(model, run, tmp_path, prompts, steps):
    few = {"prompts": PROMPTS[:prompts], "seeds": (0,), "sampling": (SMALL, Sampling(num_inference_steps=steps))}
    result = run(model("a"), model("b"), thresholds={"step_time_ratio": Threshold(max=1e6)}, **few)
    assert result.reference.step_ms is None
    assert "too few denoising steps to time" in result.unavailable["step_time_ratio"]
    assert result.verdict.outcome == "INCONCLUSIVE"
    assert not any("step_time_ratio" in item.metrics for item in result.items)
    assert "too few denoising steps to time" in (tmp_path / "out" / "report.html").read_text()


def test_three_timed_steps_are_enough_for_a_ratio(model, run):
    three = {"seeds": (0,), "sampling": (SMALL, Sampling(num_inference_steps=2))}
    result = run(model("a"), model("b"), thresholds={"step_time_ratio": Threshold(max=1e6)}, **three)
    assert result.reference.step_ms.count == 3
    assert result.verdict.outcome == "PASS"


def test_later_sampling_layers_win_and_the_family_fills_in_the_rest(model, run):
    result = run(model("a"), model("b"), sampling=(SMALL, Sampling(num_inference_steps=3)))
    assert len(result.timesteps) == 3
    assert result.sampling.height == 32
    assert result.sampling.max_sequence_length == 512


def test_progress_grows_to_the_number_of_images(model, run):
    seen = []
    run(model("a"), model("b"), on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == 13  # twice six images and the noise floor
    assert [progress.role for progress in seen if progress.shot is None] == ["reference", "candidate"]


def test_the_noise_floor_can_be_left_out(model, run):
    seen = []
    assert run(model("a"), model("b"), noise_floor=False, on_progress=seen.append).noise_floor is None
    assert seen[-1].total == 12


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": ()}, RecipeError, "prompts: give at least one"),
        ({"prompts": ("a", "  ")}, RecipeError, "none of them empty"),
        ({"seeds": ()}, RecipeError, "seeds: give at least one"),
        ({"seeds": (1, 1)}, RecipeError, "each of them once"),
        ({"thresholds": {"pnsr": Threshold(min=1)}}, RecipeError, "did you mean 'psnr'"),
        ({"device": "toaster"}, RecipeError, "device: 'toaster' is unknown"),
        ({"device": "xpu"}, RecipeError, "device: 'xpu' is not available here"),
        ({"dtype": "int4"}, RecipeError, "dtype: 'int4' is unknown; use one of bfloat16"),
        (
            {"compute": "fp8"},
            BackendUnavailableError,
            "compute 'fp8': only for packed layers, and .*/model and .*/model",
        ),
        (
            {"backend": "triton"},
            BackendUnavailableError,
            "backend 'triton': only for packed layers, and .*/model and",
        ),
        ({"task": "t2v"}, UnsupportedModelError, "task t2v"),
        ({"task": "chat"}, UnsupportedModelError, "task chat: the family flux does t2i"),
        ({"sampling": (Sampling(num_frames=5),)}, RecipeError, "flux takes no num_frames"),
        ({"lpips_backbone": "model/behaviour.json"}, RecipeError, "cannot be read as AlexNet weights"),
    ],
)
def test_bad_requests_end_in_one_clear_error_and_leave_nothing(model, run, tmp_path, changes, error, message):
    reference = model("model")
    if "lpips_backbone" in changes:
        changes = {"lpips_backbone": tmp_path / changes["lpips_backbone"]}
    with pytest.raises(error, match=message):
        run(reference, reference, "parent/out", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_architecture_is_refused_before_anything_is_loaded(model, run, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit_runtime.load_pipeline", None)
    with pytest.raises(UnsupportedModelError, match="num_layers 2 against 3"):
        run(model("a"), model("b", layers=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_existing_output_is_kept_unless_overwriting(model, run, tmp_path):
    reference = model("a")
    mine = tmp_path / "out" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(OutputError, match="exists"):
        run(reference, reference)
    assert mine.read_text() == "keep"
    with pytest.raises(OutputError, match=r"holds no result\.json"):
        run(reference, reference, overwrite=True)
    assert mine.read_text() == "keep"
    (tmp_path / "out" / "result.json").write_text("{}")
    run(reference, reference, overwrite=True)
    assert not mine.exists()
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_disk_that_fills_up_leaves_nothing(model, run, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        run(model("a"), model("b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_load_is_one_error_of_quantkit(model, run, monkeypatch):
    from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError

    for theirs, ours in ((CheckpointFormatError, CheckpointError), (BackendUnavailableError, RecipeError)):

        def fail(*_arguments, theirs=theirs, **_options):
            raise theirs("x.safetensors: is truncated")

        monkeypatch.setattr("quantkit_runtime.load_pipeline", fail)
        with pytest.raises(ours, match=r"x\.safetensors: is truncated"):
            run(model("a"), model("b"))


def test_a_device_that_is_too_small_is_one_error_of_quantkit(model, run, monkeypatch):
    import torch

    def fail(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("quantkit_runtime.load_pipeline", fail)
    with pytest.raises(QuantkitError, match=r"does not fit into the memory of cpu: CUDA out of memory[^\n]*$"):
        run(model("a"), model("b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"schema_version": 9}, "schema_version: this quantkit reads version 1 only"),
        (lambda data: data | {"surprise": 1}, "surprise: "),
        (lambda data: {key: value for key, value in data.items() if key != "verdict"}, "verdict: "),
    ],
)
def test_a_result_that_cannot_be_read_says_which_key(model, run, tmp_path, change, message):
    run(model("a"), model("b"))
    path = tmp_path / "out" / "result.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        read_result(path)


def test_a_result_that_is_missing_or_no_json_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_result(tmp_path / "nothing.json")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="no result of quantkit compare"):
        read_result(tmp_path)
