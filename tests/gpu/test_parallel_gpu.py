"""Two ranks on one accelerator through gloo, and on two through NCCL or XCCL: they give what one rank alone gives.

It shows that the exchange is right on accelerators, not that it is fast. quantkit-runtime is all that it needs.
"""

import shutil
from pathlib import Path

import pytest
import rank_jobs
import torch
from jobs import read

from quantkit_runtime.parallel.launch import launch
from rounding import round_component

pytestmark = [pytest.mark.gpu, pytest.mark.multi_rank]

DEMO = Path(__file__).parents[2] / "quantkit" / "demo" / "pipeline"
KWARGS = {
    "prompt": "a large red circle at the center on white", "negative_prompt": "", "height": 64, "width": 64,
    "num_inference_steps": 6, "true_cfg_scale": 2.0, "max_sequence_length": 48, "seed": 3,
}  # fmt: skip
BRANCHES = [
    {"name": "cfg", "model": "demo", "mesh": [2, 1], "dtype": "bfloat16", "kwargs": KWARGS},
    {"name": "cfg w4", "model": "demo w4", "mesh": [2, 1], "dtype": "bfloat16", "kwargs": KWARGS},
]
SHARES = [
    {"name": "tp", "model": "demo", "mesh": [1, 2], "dtype": "float32", "kwargs": KWARGS},
    {"name": "tp w4", "model": "demo w4", "mesh": [1, 2], "dtype": "float32", "kwargs": KWARGS},
    {"name": "tp w4 bf16", "model": "demo w4", "mesh": [1, 2], "dtype": "bfloat16", "kwargs": KWARGS},
]


@pytest.fixture(scope="module", params=["one accelerator", "one for each rank"])
def device(request):
    """As the ranks take it."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    kind = torch.accelerator.current_accelerator().type
    if request.param == "one accelerator":
        return f"{kind}:0"
    if torch.accelerator.device_count() < 2:
        pytest.skip("one accelerator")
    return kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the embedded model and of the same one in 4 bit."""
    packed = tmp_path_factory.mktemp("packed") / "demo"
    shutil.copytree(DEMO, packed, ignore=shutil.ignore_patterns("transformer"))
    blocks = ("transformer_blocks", "single_transformer_blocks")
    round_component(DEMO / "transformer", packed / "transformer", blocks, group_size=32)
    return {"demo": str(DEMO), "demo w4": str(packed)}


@pytest.fixture(scope="module")
def ranks(device, folders, tmp_path_factory):
    """What both ranks made of every job, by its name."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [{**job, "model": folders[job["model"]]} for job in (*BRANCHES, *SHARES)]
    launch(rank_jobs.run, (jobs, folder, device), 2)
    return read(jobs, folder, ranks=2)


@pytest.fixture(scope="module")
def alone(device, folders):
    """Latents of one rank alone: ``alone("demo w4", "float32")``."""
    known = {}

    def run(model, dtype):
        if (model, dtype) not in known:
            job = {"model": folders[model], "dtype": dtype, "kwargs": KWARGS}
            pipe = rank_jobs.prepared(job, device=device)
            with torch.no_grad():
                known[model, dtype] = pipe(**rank_jobs.arguments_of(job), output_type="latent").images.cpu()
        return known[model, dtype]

    return run


def distance(latents, expected):
    return (latents.float() - expected.float()).norm() / expected.float().norm()


@pytest.mark.parametrize("job", BRANCHES, ids=lambda job: job["name"])
def test_a_branch_on_each_of_two_ranks_gives_the_bits_of_both_on_one(ranks, alone, job):
    for rank in ranks[job["name"]]:
        assert "error" not in rank, rank
        assert torch.equal(rank["latents"], alone(job["model"], job["dtype"]))


@pytest.mark.parametrize("job", SHARES, ids=lambda job: job["name"])
def test_shared_weights_give_what_one_rank_gives_within_rounding(ranks, alone, job):
    expected, rounding = alone(job["model"], "float32"), 1e-4
    if job["dtype"] == "bfloat16":  # rounds each rank's part of a sum, too: some times as much as one rank does
        rounding = 3 * distance(alone(job["model"], "bfloat16"), expected)
    first, second = (rank["latents"] for rank in ranks[job["name"]])
    assert torch.isfinite(first).all()
    assert distance(first, expected) < rounding
    assert torch.equal(first, second)
