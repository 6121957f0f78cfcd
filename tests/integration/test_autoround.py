"""What quantkit writes is what auto-round itself would have written, and auto-round's loader reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import open_model, read_tensors
from quantkit.quantize.tensors import read_tensor
from quantkit.quantize.verify import verify

PEER = Path(__file__).parent / "autoround_peer.py"


def run_peer(*arguments):
    done = subprocess.run(
        [sys.executable, PEER, *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def pipeline_folder(folder):
    [index] = folder.rglob("model_index.json")
    return index.parent


def assert_packed_tensors_equal(ours, theirs):
    packed = {name for name in theirs if name.endswith((".qweight", ".qzeros", ".scales"))}
    assert len(packed) == 3 * 40
    assert packed == {name for name in ours if name.endswith((".qweight", ".qzeros", ".scales"))}
    for name in sorted(packed):
        one, other = read_tensor(ours[name]), read_tensor(theirs[name])
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@pytest.fixture(scope="module")
def autorounds_rtn(flux_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoround-rtn")
    run_peer("rtn", flux_model, folder, 4, 64)
    return pipeline_folder(folder)


def test_rounding_is_bit_identical_to_autorounds_regular_rtn(rtn_checkpoint, autorounds_rtn):
    ours, theirs = (open_model(folder).components["transformer"] for folder in (rtn_checkpoint, autorounds_rtn))
    assert_packed_tensors_equal(ours.tensors, theirs.tensors)


def test_verify_reads_a_checkpoint_that_autoround_wrote(autorounds_rtn):
    result = verify(autorounds_rtn)
    assert result.problems == []
    assert len(result.layers["transformer"]) == 40


def test_our_metadata_is_autorounds_own(rtn_checkpoint, autorounds_rtn):
    ours, theirs = (
        open_model(folder).components["transformer"].quantization for folder in (rtn_checkpoint, autorounds_rtn)
    )
    keys = ("quant_method", "bits", "group_size", "sym", "data_type", "packing_format", "autoround_version")
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    blocks = [config["block_name_to_quantize"] for config in (ours, theirs)]
    assert sorted(blocks[0].split(",")) == sorted(blocks[1].split(",") if isinstance(blocks[1], str) else blocks[1])


def test_tuned_layers_are_packed_as_autoround_packs_them(quantize_tiny, tmp_path, monkeypatch):
    from quantkit.quantize import run as quantize_run

    jobs = []

    def keep_job(job, blocks, work, on_progress):
        tuned = tune(job, blocks, work, on_progress)
        jobs.append((work / "job.json").read_text())
        return tuned

    tune = quantize_run.tune
    monkeypatch.setattr(quantize_run, "tune", keep_job)
    ours = quantize_tiny(tmp_path / "ours", "scheme.iters=6", "scheme.lr=0.1").output
    (tmp_path / "job.json").write_text(jobs[0])
    run_peer("save", tmp_path / "job.json", tmp_path / "theirs")
    [config] = [
        path for path in (tmp_path / "theirs").rglob("config.json") if "FluxTransformer" in path.read_text()
    ]
    assert_packed_tensors_equal(read_tensors(ours / "transformer"), read_tensors(config.parent))


def test_diffusers_with_autoround_loads_it_and_draws_what_our_runtime_draws(rtn_checkpoint, tmp_path):
    from quantkit_runtime import load_pipeline

    run_peer("load", rtn_checkpoint, tmp_path / "latents.pt")
    theirs = torch.load(tmp_path / "latents.pt")
    pipeline = load_pipeline(rtn_checkpoint, device="cpu", dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    ours = pipeline(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.isfinite(theirs).all()
    # auto-round's CPU kernel multiplies scales in half precision.
    distance = torch.linalg.vector_norm(ours.float() - theirs.float()) / torch.linalg.vector_norm(ours.float())
    assert distance < 0.02
