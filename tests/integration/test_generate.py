"""``quantkit generate``: what it writes for every kind of model, alone and on several ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quantkit.demo
from quantkit.cli.main import main
from quantkit_runtime import load_pipeline

DEMO = ["demo", "--prompt", "a red circle", "--seed", "3", "--device", "cpu", "--num-inference-steps", "4"]
WAN = ["--prompt", "a red circle", "--height", "32", "--width", "32", "--num-frames", "5", "--device", "cpu",
       "--num-inference-steps", "2", "--max-sequence-length", "16", "--seed", "1"]  # fmt: skip
SOUND = Path(__file__).parents[2] / "eval" / "prompts" / "media" / "one-tone.wav"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``quantkit generate`` in this process: ``code, standard output, standard error = run(...)``."""
    torch.set_num_threads(1)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantkit", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def start(*arguments, ranks=None):
    """Start ``quantkit generate``, or that many ranks of it under torchrun, in a process of its own."""
    program = [sys.executable, "-m"]
    program += ["quantkit.cli.main"] if ranks is None else [
        "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "quantkit.cli.main",
    ]  # fmt: skip
    return subprocess.Popen(
        [*program, "generate", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pixels(path):
    return np.asarray(Image.open(path))


def test_an_image_is_what_the_pipeline_gives(run, tmp_path):
    code, output, errors = run(*DEMO, "--true-cfg-scale", 2, "--output", tmp_path / "a.png")
    assert (code, output) == (0, f"{tmp_path / 'a.png'}\n")
    assert "seed 3, 4 steps in" in errors
    pipe = load_pipeline(quantkit.demo.path())
    made = pipe(
        "a red circle", negative_prompt="", height=64, width=64, num_inference_steps=4, guidance_scale=1.0,
        true_cfg_scale=2.0, max_sequence_length=48, generator=torch.Generator("cpu").manual_seed(3),
    )  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(made.images[0]))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_a_video_is_written_as_mp4_gif_or_frames(run, tiny_model, tmp_path):
    import av

    for name in ("a.mp4", "a.gif", "frames"):
        code, _, errors = run(tiny_model("wan_t2v"), *WAN, "--output", tmp_path / name)
        assert code == 0, errors
    frames = sorted((tmp_path / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"frame{index:04d}.png" for index in range(5)]
    with av.open(str(tmp_path / "a.mp4")) as container:
        video = container.streams.video[0]
        assert (video.average_rate, video.width, video.height) == (16, 32, 32)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video)])
    wanted = np.stack([pixels(frame) for frame in frames])
    assert decoded.shape == wanted.shape
    # Random models draw noise, of which 4:2:0 keeps every fourth colour; brightness must survive.
    assert np.corrcoef(decoded.mean(-1).ravel(), wanted.mean(-1).ravel())[0, 1] > 0.9
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 5


def test_a_video_starts_from_the_picture(run, tiny_model, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    model = tiny_model("wan_i2v")
    assert run(model, *WAN, "--image", tmp_path / "red.png", "--output", tmp_path / "a.gif")[0] == 0
    code, _, errors = run(model, *WAN, "--output", tmp_path / "b.gif")
    assert (code, errors) == (2, "error: --image: wan2.2-i2v starts from a picture; give one\n")


@pytest.mark.parametrize("model", ["glm_image", "ovis_image", "wan_ti2v"])
def test_the_other_families_draw(run, tiny_model, tmp_path, model):
    flags = {"wan_ti2v": ["--num-frames", 5, "--height", 64, "--width", 64]}.get(
        model, ["--height", 32, "--width", 32]
    )
    name = "a.gif" if model == "wan_ti2v" else "a.png"
    code, _, errors = run(
        tiny_model(model), "-p", "a red circle", *flags, "--num-inference-steps", 2, "-o", tmp_path / name,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, errors
    assert (tmp_path / name).is_file()


def test_an_answer_to_text_picture_and_sound_goes_to_standard_output_or_a_file(run, tmp_path):
    from tiny_omni import build_qwen2_5_omni

    model = build_qwen2_5_omni(tmp_path / "model")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    ask = [model, "--prompt", "What is this?", "--max-new-tokens", 8, "--device", "cpu"]
    code, plain, errors = run(*ask)
    assert code == 0, errors
    _, answer, _ = run(*ask, "--image", tmp_path / "red.png", "--audio", SOUND)
    assert answer != plain
    code, output, _ = run(*ask, "--output", tmp_path / "answer.txt")
    assert (code, output) == (0, f"{tmp_path / 'answer.txt'}\n")
    assert (tmp_path / "answer.txt").read_text() == plain


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [("{", "Expecting property name"), ('{"recipe": {"effective": {"version": 2}}}', "recipe.effective.version: ")],
)
def test_a_broken_manifest_is_told_of_and_the_model_runs_all_the_same(
    run, rtn_checkpoint, tmp_path, manifest, reason
):
    model = shutil.copytree(rtn_checkpoint, tmp_path / "model")
    ask = [model, *DEMO[1:], "--height", 32, "--width", 32, "--guidance-scale", 3.5]
    assert run(*ask, "--output", tmp_path / "a.png")[0] == 0
    (model / "quantkit.json").write_text(manifest)
    code, _, errors = run(*ask, "--output", tmp_path / "b.png")
    assert code == 0, errors
    assert errors.startswith(f"warning: {model / 'quantkit.json'}: holds no recipe that this version can read: ")
    assert reason in errors.splitlines()[0]
    assert errors.splitlines()[0].endswith("; sampled as its family is")
    assert pixels(tmp_path / "b.png").shape == pixels(tmp_path / "a.png").shape


def test_guidance_that_is_off_is_refused_with_code_2(run, tmp_path):
    code, _, errors = run(*DEMO, "--true-cfg-scale", 1, "--cfg-parallel", 2, "--output", tmp_path / "a.png")
    assert code == 2
    assert errors.startswith("error: --cfg-parallel: guidance is off")
    assert not list(tmp_path.iterdir())


@pytest.mark.multi_rank
def test_two_ranks_draw_what_one_draws_and_only_one_of_them_talks(run, tmp_path):
    run(*DEMO, "--output", tmp_path / "one.png")
    both = start(*DEMO, "--cfg-parallel", 2, "--output", tmp_path / "two.png")
    output, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    assert output == f"{tmp_path / 'two.png'}\n"
    assert errors.count("seed 3, 4 steps in") == 1
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))


@pytest.mark.multi_rank
def test_replicas_draw_seeds_that_follow_one_another(run, tmp_path):
    both = start(*DEMO, "--replicas", 2, "--output", tmp_path / "a.png")
    output, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    files = [tmp_path / f"a-seed{seed}.png" for seed in (3, 4)]
    assert sorted(output.split()) == sorted(map(str, files))
    assert sorted(tmp_path.iterdir()) == files
    run(*[argument if argument != "3" else "4" for argument in DEMO], "--output", tmp_path / "four.png")
    assert np.array_equal(pixels(files[1]), pixels(tmp_path / "four.png"))


@pytest.mark.multi_rank
def test_ranks_of_torchrun_that_are_asked_for_different_things_refuse(tmp_path):
    script = tmp_path / "each.sh"
    command = [sys.executable, "-m", "quantkit.cli.main", "generate", "demo", "--prompt", "red", "--device", "cpu"]
    script.write_text(
        f"exec {' '.join(command)} --height $((64 + 16 * RANK)) --tensor-parallel 2 --output {tmp_path}/a.png\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "sh",
         str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: sampling: not the same on all ranks" in done.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.multi_rank
def test_a_rank_may_lag_but_its_death_ends_the_run_and_leaves_nothing(tmp_path):
    demo = [argument for argument in DEMO if argument not in ("--num-inference-steps", "4")]
    run = start(*demo, "--num-inference-steps", 5000, "--cfg-parallel", 2, "--output", tmp_path / "a.png")
    try:
        first = progress(run.stderr)
        ranks = children(run.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)
        os.kill(ranks[1], signal.SIGCONT)
        assert progress(run.stderr) > first
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 2
    assert "error: rank 1: Signal 9 (SIGKILL)" in errors
    assert not list(tmp_path.iterdir())
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def progress(stream):
    """Wait for a line of progress and return the steps that it tells."""
    for line in stream:
        if line.startswith("generating: "):
            return int(line.split()[1].split("/")[0])
    raise AssertionError("the run ended without progress")


def children(pid):
    """Return the ranks that a process has started, in order; torch's own helper processes are none."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
