"""CFG-parallel on two ranks: what comes out is what one rank alone gives, or a clear refusal."""

import re

import pytest
import rank_jobs
import torch
from jobs import assert_no_growth, launch, results

from quantkit_runtime.parallel import cfg
from quantkit_runtime.parallel.call import Watch

pytestmark = pytest.mark.multi_rank

COMMON = {"prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 6, "seed": 3}
NEGATIVE = {"negative_prompt": "a blue square"}
FLUX = {**COMMON, **NEGATIVE, "true_cfg_scale": 2.0, "max_sequence_length": 16}
WAN = {**COMMON, **NEGATIVE, "num_frames": 5, "guidance_scale": 4.0}
EXPERTS = {**WAN, "guidance_scale_2": 3.0}
IMAGE = {**COMMON, "num_inference_steps": 4, "guidance_scale": 3.0}

EQUAL = [
    {"name": "flux", "model": "flux", "kwargs": FLUX},
    {"name": "flux, two prompts", "model": "flux", "kwargs": {**FLUX, "prompt": ["a red circle", "a blue square"]}},
    {"name": "flux, one step", "model": "flux", "kwargs": {**FLUX, "num_inference_steps": 1}},
    {"name": "flux, equal prompts", "model": "flux", "kwargs": {**FLUX, "negative_prompt": FLUX["prompt"]}},
    {"name": "flux, slow rank", "model": "flux", "kwargs": FLUX, "callback": ["slow_rank", 1, 0.1]},
    {"name": "flux, step cache", "model": "flux", "kwargs": {**FLUX, "num_inference_steps": 12}, "step_cache": 0.2},
    {"name": "flux, recorded", "model": "flux", "kwargs": FLUX, "recorded": True},
    {"name": "wan, recorded", "model": "wan_t2v", "kwargs": EXPERTS, "recorded": True},
    {"name": "wan t2v", "model": "wan_t2v", "kwargs": EXPERTS},
    {"name": "wan i2v", "model": "wan_i2v", "kwargs": {**EXPERTS, "image": 32}},
    {"name": "wan ti2v", "model": "wan_ti2v", "kwargs": {**WAN, "height": 64, "width": 64}},
    {"name": "wan, guidance pauses", "model": "wan_t2v", "kwargs": EXPERTS, "callback": ["drop_guidance_after", 2]},
    {"name": "wan, other prompt", "model": "wan_t2v", "kwargs": EXPERTS, "callback": ["other_prompt_after", 2],
     "callback_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"]},
    {"name": "ovis", "model": "ovis_image", "kwargs": {**IMAGE, **NEGATIVE}},
    {"name": "glm", "model": "glm_image", "kwargs": IMAGE},
    # Its guidance pauses in the last step.
    {"name": "bagel", "model": "bagel", "kwargs": {**IMAGE, "num_inference_steps": 7}},
]  # fmt: skip
REFUSED = {
    "no guidance": {"model": "flux", "kwargs": {**FLUX, "true_cfg_scale": 1.0}},
    "no guidance of bagel": {"model": "bagel", "kwargs": {**IMAGE, "guidance_scale": 1.0}},
    "other prompt on rank 1": {"model": "flux", "kwargs": FLUX, "on_rank_1": {"prompt": "a blue square"}},
    "other seed on rank 1": {"model": "flux", "kwargs": FLUX, "on_rank_1": {"seed": 4}},
    "latents disturbed on rank 1": {"model": "flux", "kwargs": FLUX, "callback": ["disturb_rank", 1, 3]},
}
MANY = {"name": "many", "model": "flux", "kwargs": {**FLUX, "num_inference_steps": 2}, "repeat": 50}
NO_SEED = {"name": "no seed", "model": "flux", "kwargs": {k: v for k, v in FLUX.items() if k != "seed"}}


@pytest.fixture(scope="module")
def ranks(tiny_model, tmp_path_factory):
    """What both ranks made of every job, by its name."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [*EQUAL, NO_SEED, MANY, *({"name": name, **job} for name, job in REFUSED.items())]
    return results([{**job, "model": str(tiny_model(job["model"]))} for job in jobs], folder, ranks=2)


@pytest.fixture
def alone(tiny_model):
    def run(job):
        pipe = rank_jobs.prepared({**job, "model": tiny_model(job["model"])})
        counts = rank_jobs.count_blocks(pipe)
        with torch.no_grad():
            output = pipe(**rank_jobs.arguments_of(job), output_type="latent")
        return rank_jobs.result_of(output), counts["forwards"]

    return run


@pytest.mark.parametrize("job", EQUAL, ids=lambda job: job["name"])
def test_both_ranks_hold_the_bits_of_the_sequential_run(ranks, alone, job):
    expected, _ = alone(job)
    assert torch.isfinite(expected).all()
    for rank in ranks[job["name"]]:
        assert "error" not in rank, rank
        assert torch.equal(rank["latents"], expected)


@pytest.mark.parametrize("job", [job for job in EQUAL if job["name"] in {"flux", "wan t2v", "ovis", "glm"}],
                         ids=lambda job: job["name"])  # fmt: skip
def test_each_rank_computes_one_branch_per_step_after_the_first(ranks, alone, job):
    _, forwards = alone(job)
    for rank in ranks[job["name"]]:
        assert rank["forwards"] == forwards // 2 + 1


def test_without_a_seed_both_ranks_use_the_one_that_was_drawn(ranks):
    first, second = (rank["latents"] for rank in ranks["no seed"])
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no guidance", "guidance is off: .* turn guidance on"),
        ("no guidance of bagel", "guidance is off: .* turn guidance on"),
        ("other prompt on rank 1", "^prompt: not the same on all ranks"),
        ("other seed on rank 1", "^generator: not the same on all ranks"),
        ("latents disturbed on rank 1", "step 5: the ranks have drifted apart"),
    ],
)
def test_what_cannot_be_right_is_refused_on_both_ranks(ranks, name, reason):
    for rank in ranks[name]:
        assert re.search(reason, rank["error"])


def test_fifty_generations_in_a_row_take_no_more_memory_than_ten(ranks):
    assert_no_growth(ranks["many"])


def test_where_guidance_pauses_one_call_of_a_single_batch_is_made_alike_on_both_ranks(monkeypatch):
    rows = []

    class Denoiser(torch.nn.Module):
        def forward(self, sample):
            rows.append(len(sample))
            return (sample * 2,)

    watch = Watch(())
    branches = cfg._Branches(None, watch)
    monkeypatch.setattr(cfg.dist, "get_rank", lambda _group: 0)
    monkeypatch.setattr(branches, "_exchange", lambda mine: (mine, mine))  # the halves are equal here
    forward = branches.wrap_forward(Denoiser())
    latents = torch.ones(2, 4)
    for is_guided in (True, True, False, True):
        given = torch.cat([latents, latents]) if is_guided else latents
        assert torch.equal(forward(given)[0], given * 2)
        branches.end_step(latents)
        watch.step += 1
    assert rows == [4, 2, 2, 2]  # both halves once, then this rank's; without guidance all of the one


def test_a_rank_that_dies_ends_the_other(tiny_model, tmp_path):
    job = {"name": "dies", "model": str(tiny_model("flux")), "kwargs": FLUX, "callback": ["end_rank", 1, 2]}
    other, died = launch([job], tmp_path, ranks=2)
    assert died == 9
    assert other == 1  # by an exception
    assert not list(tmp_path.glob("dies-rank*.pt"))
