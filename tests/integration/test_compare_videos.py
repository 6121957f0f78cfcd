"""Comparing tiny Wan pipelines: two experts, a picture to start from, a timestep per token."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.perturb import perturb

from quantkit.compare.report import render
from quantkit.compare.request import Request
from quantkit.compare.result import read_result
from quantkit.compare.run import compare
from quantkit.compare.trajectory import record
from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.registry import detect
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling
from quantkit_runtime import load_pipeline

PROMPTS = (Prompt("a red circle on the left"), Prompt("a blue square on white"))
SMALL = Sampling(height=32, width=48, num_frames=9, num_inference_steps=4, max_sequence_length=16)
INPUTS = SMALL.given() | {"prompt": "a red circle", "guidance_scale": 3.0, "width": 64}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def picture(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(
        folder / "start.png"
    )
    return folder / "start.png"


@pytest.fixture(scope="module")
def results(tiny_model, folder):
    """T2V-A14B against itself, and against candidates with one of the experts disturbed."""
    source = tiny_model("wan_t2v")
    candidates = {
        "same": source,
        "noisy": perturb(source, folder / "noisy", 0.3, "transformer/*.safetensors"),
        "late": perturb(source, folder / "late", 0.3, "transformer_2/*.safetensors"),
    }
    return {
        name: compare(
            Request(source, candidate, PROMPTS, (0,), task="t2v", sampling=(SMALL,), device="cpu"),
            folder / f"result-{name}",
        )
        for name, candidate in candidates.items()
    }


def test_a_pipeline_compared_with_itself_is_exactly_equal(results, shows):
    result = results["same"]
    assert result.verdict.outcome == "PASS"
    curves = [item.curves for item in result.items]
    assert {value for curve in curves for name in curve if name != "frame_psnr" for value in curve[name]} == {0.0}
    assert {value for curve in curves for value in curve["frame_psnr"]} == {100.0}
    assert result.metrics["temporal_difference_mae"].value == result.metrics["mae_drift"].value == 0
    assert result.noise_floor.metrics["psnr"] == 100
    shows("wan2.2-t2v", "compare")


def test_each_expert_shows_from_its_own_first_step_on(results):
    noisy, late = (results[name].curves["latent_rel_l2"].median for name in ("noisy", "late"))
    timesteps = results["same"].timesteps
    switch = next(index for index, timestep in enumerate(timesteps) if timestep < 875)
    assert 0 < switch < len(timesteps)
    assert noisy[0] > 0
    assert set(late[:switch]) == {0.0}
    assert all(value > 0 for value in late[switch:])


def test_every_frame_and_every_change_between_frames_is_measured(results, folder):
    result = results["noisy"]
    item = result.items[0]
    assert (len(item.curves["frame_psnr"]), len(item.curves["frame_motion_error"])) == (9, 8)
    frames = {
        role: [
            np.asarray(Image.open(file), dtype=np.float64)
            for file in sorted((folder / "result-noisy" / getattr(item.output, role)).iterdir())
        ]
        for role in ("reference", "candidate")
    }
    ours, theirs = np.array(frames["reference"]), np.array(frames["candidate"])
    assert ours.shape == (9, 32, 48, 3)
    psnr = 10 * np.log10(255**2 / ((ours - theirs) ** 2).mean(axis=(1, 2, 3)))
    assert item.curves["frame_psnr"] == pytest.approx(psnr)
    assert item.metrics["psnr"] == pytest.approx(psnr.mean())
    assert item.metrics["psnr_min_over_frames"] == pytest.approx(psnr.min())
    motion = np.abs(np.diff(ours, axis=0) - np.diff(theirs, axis=0)).mean()
    assert item.metrics["temporal_difference_mae"] == pytest.approx(motion, rel=1e-5)
    steady = [1 - np.abs(np.diff(video, axis=0)).mean() / 255 for video in (theirs, ours)]
    assert item.metrics["temporal_flickering_change"] == pytest.approx(steady[0] - steady[1], abs=1e-6)


def test_the_built_in_thresholds_of_videos_hold_pictures_and_drift(results):
    rows = [row.metric for row in results["noisy"].verdict.rows]
    assert rows == ["psnr", "mae", "image_cosine", "image_rel_l2", "mae_drift"]


def test_the_report_holds_players_in_itself_and_names_what_it_needs(results, folder):
    text = (folder / "result-noisy" / "report.html").read_text()
    assert "Videos, worst first" in text
    assert "9 frames of 48 \u00d7 32 pixels" in text
    assert text.count("data:image/webp;base64,") == 3 * len(results["noisy"].items)
    assert 'class="sheet candidate pixelated"' in text
    assert read_result(folder / "result-noisy") == results["noisy"]


def test_videos_beyond_the_budget_are_left_out_best_first_and_counted(results, folder):
    text = render(results["noisy"], folder / "result-noisy", budget_bytes=0)
    assert text.count("data:image/webp;base64,") == 3
    assert "1 prompt that came out better is left out" in text


def test_a_missing_frame_is_one_clear_error(results, folder, tmp_path):
    shutil.copytree(folder / "result-late", tmp_path / "late")
    (tmp_path / "late" / results["late"].items[0].output.candidate / "frame0003.png").unlink()
    with pytest.raises(CheckpointError, match=r"frame0003\.png: cannot be read as an image"):
        render(results["late"], tmp_path / "late")


def test_the_result_names_the_sizes_that_came_out_where_the_pipeline_rounds_them(tiny_model, folder, monkeypatch):
    source = tiny_model("wan_ti2v")
    # Of a family that cannot tell which sizes its models draw.
    monkeypatch.setattr("quantkit.compare.run.detect", lambda model: replace(detect(model), grid=None))
    asked = Sampling(height=32, width=48, num_frames=5, num_inference_steps=2, max_sequence_length=16)
    request = Request(source, source, PROMPTS[:1], (0,), task="t2v", sampling=(asked,), device="cpu")
    sampling = compare(request, folder / "result-rounded").sampling
    assert (sampling.height, sampling.width, sampling.num_frames) == (32, 32, 5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 33}, "--height: is 33, but this wan2.2-t2v model draws multiples of 16; use 32 or 48"),
        ({"num_frames": 8}, "--num-frames: is 8, but .* draws 1 more than multiples of 4; use 5 or 9"),
        ({"width": 2**20}, "--width, .*height: 1048576 x 32 are 33554432 pixels; more than 4194304 are drawn with"),
    ],
)
def test_a_size_that_the_model_cannot_draw_is_one_clear_error(tiny_model, folder, asked, message):
    source = tiny_model("wan_t2v")
    sampling = (SMALL, Sampling(**asked))
    with pytest.raises(RecipeError, match=message):
        compare(Request(source, source, PROMPTS, task="t2v", seeds=(0,), sampling=sampling), folder / "refused")
    assert not (folder / "refused").exists()


def test_a_video_from_a_picture_is_compared_from_the_latents_alone(tiny_model, folder, picture, shows):
    source = tiny_model("wan_i2v")
    result = compare(
        Request(
            source,
            perturb(source, folder / "i2v", 0.1, "transformer*/*.safetensors"),
            (Prompt("a red circle", str(picture)),),
            (3,),
            task="i2v",
            sampling=(SMALL,),
            device="cpu",
            noise_floor=False,
        ),
        folder / "result-i2v",
    )
    assert 0 < result.metrics["latent_rel_l2"].value < 1
    kept = folder / "result-i2v" / result.prompts[0].image
    assert kept.read_bytes() == picture.read_bytes()
    assert "starts from this picture" in (folder / "result-i2v" / "report.html").read_text()
    shows("wan2.2-i2v", "compare")


def test_a_video_of_one_transformer_is_compared(tiny_model, folder, shows):
    source = tiny_model("wan_ti2v")
    candidate = perturb(source, folder / "ti2v", 0.1, "transformer/*.safetensors")
    asked = SMALL.model_copy(update={"height": 64, "width": 64})
    request = Request(
        source, candidate, PROMPTS[:1], (0,), task="t2v", sampling=(asked,), device="cpu", noise_floor=False
    )
    result = compare(request, folder / "result-ti2v")
    assert all(0 < value < 1 for value in result.items[0].curves["latent_rel_l2"])
    shows("wan2.2-ti2v", "compare")


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v", "wan_ti2v"])
def test_the_noise_is_what_the_seed_draws_without_picture_or_cast(tiny_model, picture, name):
    inputs = dict(INPUTS)
    if name == "wan_i2v":
        inputs["image"] = Image.open(picture).convert("RGB")
    pipeline = load_pipeline(tiny_model(name))
    pipeline.set_progress_bar_config(disable=True)
    trajectory = record(pipeline, inputs, 7)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn((1, 4, *trajectory.latents.shape[3:]), generator=generator)
    assert np.array_equal(trajectory.latents[0], noise.numpy())
    assert trajectory.frames.shape == (9, 32, 64, 3)


def test_the_command_line_compares_a_video_model_without_options_of_its_family(
    tiny_model, folder, picture, monkeypatch, capfd
):
    from quantkit.cli.main import main

    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"caption": "a red circle", "image": picture.name}))
    source = str(tiny_model("wan_i2v"))
    candidate = shutil.copytree(source, folder / "cli-candidate")
    monkeypatch.setattr(
        "sys.argv",
        [
            "quantkit", "compare", "--task", "i2v", "--reference", source, "--candidate", str(candidate),
            "--device", "cpu", "--prompts", str(prompts), "--height", "32", "--width", "32", "--num-frames", "5",
            "--num-inference-steps", "2", "--output", str(folder / "cli"), "--no-noise-floor",
        ],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capfd.readouterr()
    assert (ended.value.code or 0) == 0, captured.err
    assert "PASS" in captured.out
    assert read_result(folder / "cli").sampling.num_frames == 5


def test_a_prompt_without_the_picture_it_needs_is_refused_before_anything_is_loaded(tiny_model, folder):
    source = tiny_model("wan_i2v")
    with pytest.raises(RecipeError, match="prompts: 0: has no image, which i2v starts from"):
        compare(Request(source, source, PROMPTS, (0,), task="i2v", sampling=(SMALL,)), folder / "none")
    with pytest.raises(RecipeError, match="prompts: 0: has an image, which t2v takes none of"):
        compare(Request(source, source, (Prompt("a", "b.png"),), (0,), task="t2v"), folder / "none")
    with pytest.raises(RecipeError, match=r"b\.png: no such image \(prompt 0\)"):
        compare(Request(source, source, (Prompt("a", "b.png"),), (0,), task="i2v"), folder / "none")
    assert not (folder / "none").exists()
