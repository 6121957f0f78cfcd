"""Ranks that share a denoiser's weights or tokens: what comes out is what one rank alone gives."""

import json

import pytest
import rank_jobs
import torch
from jobs import assert_no_growth, results
from tiny.chat import build_chat, round_chat
from tiny_bagel import build_bagel
from tiny_omni import build_qwen2_5_omni, build_qwen3_omni

import quantkit.demo
from quantkit.checkpoint import open_model
from quantkit.families.registry import detect, family_names
from quantkit.quantize.run import prepare, quantize
from quantkit.recipe import load_recipe
from quantkit_runtime import load_pipeline
from quantkit_runtime.errors import ParallelError

pytestmark = pytest.mark.multi_rank

COMMON = {"prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 3, "seed": 3}
GUIDED = {**COMMON, "negative_prompt": "a blue square", "guidance_scale": 3.0}
DEMO = {**COMMON, "negative_prompt": "", "true_cfg_scale": 2.0, "max_sequence_length": 48}
WAN = {**GUIDED, "num_frames": 5, "guidance_scale_2": 2.0}
TI2V = {**GUIDED, "height": 64, "width": 64, "num_frames": 5}
GLM = {**COMMON, "guidance_scale": 3.0}
BAGEL = {**COMMON, "prompt": "draw a red circle", "guidance_scale": 4.0}
BUILD = {
    "demo": lambda _folder: quantkit.demo.path(),
    "llama": build_chat,
    "qwen2.5-omni": lambda folder: build_qwen2_5_omni(folder, kv_heads=2),
    "qwen3-omni": lambda folder: build_qwen3_omni(folder, kv_heads=2),
    "bagel": build_bagel,
}
SHARED = {"mesh": [1, 2], "dtype": "float32"}
BOTH = {"mesh": [2, 2], "dtype": "float32"}

TWO = [
    {"name": "demo bf16", "model": "demo", "kwargs": DEMO, "mesh": [1, 2]},
    {"name": "demo", "model": "demo", "kwargs": DEMO, **SHARED},
    {"name": "demo w4", "model": "demo w4", "kwargs": DEMO, **SHARED},
    {"name": "wan bf16", "model": "wan_t2v", "kwargs": WAN, "mesh": [1, 2]},
    {"name": "wan", "model": "wan_t2v", "kwargs": WAN, **SHARED},
    {"name": "wan, compiled", "model": "wan_t2v", "kwargs": WAN, **SHARED, "compile": True},
    {"name": "wan w4", "model": "wan_t2v w4", "kwargs": WAN, **SHARED},
    {"name": "wan i2v w4", "model": "wan_i2v w4", "kwargs": {**WAN, "image": 32}, **SHARED},
    {"name": "wan ti2v w4", "model": "wan_ti2v w4", "kwargs": TI2V, **SHARED},
    {"name": "glm w4", "model": "glm_image w4", "kwargs": GLM, **SHARED},
    {"name": "ovis w4", "model": "ovis_image w4", "kwargs": GUIDED, **SHARED},
    {"name": "tokens w4", "model": "demo w4", "kwargs": DEMO, **SHARED, "ulysses": True},
    {"name": "llama w4", "model": "llama w4", **SHARED, "language": True},
    {"name": "bagel w4", "model": "bagel w4", **SHARED, "language": True},
    {"name": "bagel w4, a picture", "model": "bagel w4", "kwargs": BAGEL, **SHARED},
    {"name": "bagel, drawing", "model": "bagel", **SHARED, "language": True, "drawing": True},
    {"name": "qwen2.5-omni w4", "model": "qwen2.5-omni w4", **SHARED, "language": True},
    {"name": "qwen3-omni", "model": "qwen3-omni", **SHARED, "language": True},
    {"name": "qwen3-omni w4", "model": "qwen3-omni w4", **SHARED, "language": True},
]
FOUR = [
    {"name": "demo w4, all", "model": "demo w4", "kwargs": DEMO, **SHARED, "mesh": [1, 4]},
    {"name": "demo w4, both", "model": "demo w4", "kwargs": DEMO, **BOTH},
    {"name": "wan w4, both", "model": "wan_t2v w4", "kwargs": WAN, **BOTH},
    {"name": "glm w4, both", "model": "glm_image w4", "kwargs": GLM, **BOTH},
    {"name": "bagel w4, both", "model": "bagel w4", "kwargs": BAGEL, **BOTH},
    {"name": "ovis w4, both", "model": "ovis_image w4", "kwargs": GUIDED, **BOTH},
    {"name": "tokens w4, both", "model": "demo w4", "kwargs": DEMO, **BOTH, "ulysses": True},
]
MANY = {"model": "flux w4", "kwargs": {**DEMO, "num_inference_steps": 2}, "repeat": 50}
MANY_OF_TWO = {"name": "many", **MANY, **SHARED}
MANY_OF_FOUR = {"name": "many, both", **MANY, **BOTH}
OTHER_SEED = {"model": "demo", "kwargs": DEMO, **SHARED, "on_rank_1": {"seed": 4}}
REFUSED = {"other seed on rank 1": OTHER_SEED, "other seed, direct": {**OTHER_SEED, "direct": True}}
NO_SEED = {"name": "no seed", "model": "demo", "kwargs": {k: v for k, v in DEMO.items() if k != "seed"}, **BOTH}


@pytest.fixture(scope="session")
def folder_of(tiny_model, tmp_path_factory):
    """Folder of ``demo``, a tiny model, or either rounded to nearest in groups of 32: ``folder_of("demo w4")``."""
    made = {}
    home = tmp_path_factory.mktemp("shared")

    def get(name):
        source = name.removesuffix(" w4")
        if source not in made:
            made[source] = BUILD[source](home / source) if source in BUILD else tiny_model(source)
        folder = made[source]
        if source == name:
            return folder
        if name not in made:
            recipe = home / f"{source}.yaml"
            if source == "llama":
                return made.setdefault(name, round_chat(folder, home / name))
            task = detect(open_model(folder)).task
            scheme = {"group_size": 32, "iters": 0, "nsamples": 2, "batch_size": 1}
            recipe.write_text(
                json.dumps({"version": 1, "model": {"id": source, "task": task}, "scheme": scheme}),
                encoding="utf-8",
            )
            made[name] = quantize(prepare(load_recipe(recipe), folder), home / name).output
        return made[name]

    return get


@pytest.fixture(scope="module")
def ranks(folder_of, tmp_path_factory):
    """What the ranks made of every job, by its name."""

    def run(jobs, count):
        located = [{**job, "model": str(folder_of(job["model"]))} for job in jobs]
        return results(located, tmp_path_factory.mktemp("ranks"), ranks=count)

    refused = [{"name": name, **job} for name, job in REFUSED.items()]
    return run([*TWO, MANY_OF_TWO, *refused], 2) | run([*FOUR, MANY_OF_FOUR, NO_SEED], 4)


@pytest.fixture(scope="module")
def alone(folder_of):
    """Latents of one rank alone, and the bytes of its transformer."""
    known = {}

    def run(job):
        key = (job["model"], job.get("dtype"), bool(job.get("language")))
        if key not in known:
            job = {**job, "model": folder_of(job["model"])}
            if job.get("language"):
                return known.setdefault(key, rank_jobs.logits_of(job))
            pipe = rank_jobs.prepared(job)
            with torch.no_grad():
                output = pipe(**rank_jobs.arguments_of(job), output_type="latent")
            known[key] = rank_jobs.result_of(output), rank_jobs.held_bytes(pipe)
        return known[key]

    return run


def distance(latents, expected):
    return (latents.float() - expected.float()).norm() / expected.float().norm()


@pytest.mark.parametrize("job", [*TWO, *FOUR], ids=lambda job: job["name"])
def test_shared_weights_give_what_one_rank_gives_within_rounding(ranks, alone, job):
    expected, _ = alone(job)
    first = ranks[job["name"]][0]
    assert "error" not in first, first
    assert not torch.equal(first["latents"], expected)  # it was not all computed on one rank
    rounding = 1e-5
    if "dtype" not in job:  # bf16 rounds each rank's part of a sum, too: some times as much as one rank does
        sequential, expected = expected, alone({**job, "dtype": "float32"})[0]
        rounding = 3 * distance(sequential, expected)
    assert distance(first["latents"], expected) < rounding
    for rank in ranks[job["name"]]:
        assert torch.equal(rank["latents"], first["latents"])


def test_each_familys_packed_model_is_compared_in_float32(folder_of):
    packed = {job["model"] for job in TWO if job.get("dtype") == "float32" and job["model"].endswith(" w4")}
    compared = {detect(open_model(folder_of(name))).name for name in packed - {"llama w4"}}
    assert compared == set(family_names())


@pytest.mark.parametrize("job", [job for job in (*TWO, *FOUR) if "ulysses" not in job], ids=lambda job: job["name"])
def test_every_rank_holds_its_part_of_the_weights(ranks, alone, job):
    _, whole = alone(job)
    for rank in ranks[job["name"]]:
        assert rank["held_bytes"] < whole * (0.95 if job["mesh"][1] == 2 else 0.85)


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("demo w4", ["T5EncoderModel"]),
        ("demo w4, both", ["T5EncoderModel"]),
        ("wan w4", ["UMT5EncoderModel"]),
        ("ovis w4", ["Qwen3Model"]),
    ],
)
def test_text_encoders_are_shared_too(ranks, name, encoders):
    assert all(set(encoders) <= set(rank["encoders"]) for rank in ranks[name])


def test_a_text_encoder_that_cannot_be_divided_by_so_many_ranks_stays_whole(folder_of, fake_group):
    pipe = load_pipeline(folder_of("demo w4"), tensor_parallel=fake_group(8))
    assert rank_jobs.shared_encoders(pipe) == []
    assert pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.n_heads == 4


@pytest.mark.parametrize("name", ["many", "many, both"])
def test_fifty_generations_in_a_row_take_no_more_memory_than_ten(ranks, name):
    assert_no_growth(ranks[name])


def test_without_a_seed_all_four_ranks_use_the_one_that_was_drawn(ranks):
    first, *others = (rank["latents"] for rank in ranks["no seed"])
    assert all(torch.equal(first, other) for other in others)


def test_different_arguments_are_refused_on_every_rank(ranks):
    for rank in ranks["other seed on rank 1"]:
        assert rank["error"].startswith("generator: not the same on all ranks")


def test_a_pipeline_called_past_what_keeps_its_ranks_in_step_notices_different_noise(ranks):
    for rank in ranks["other seed, direct"]:
        assert rank["error"].startswith("the ranks call the model with different inputs; call the pipeline through")


@pytest.fixture
def fake_group():
    """A group of as many ranks as are asked for, of which this process is one: ``fake_group(8, rank=3)``."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(count, rank=0):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        return dist.group.WORLD

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_head_that_a_rank_would_have_to_cut_is_refused_with_the_sizes_that_work(folder_of, fake_group):
    reason = (
        r"FluxTransformer2DModel: transformer_blocks.0.attn.to_q: out_features 256 cannot be divided by 3 ranks: "
        r"a rank's part must be a multiple of 32 \(a head\); 2, 4, 8 ranks can share this model"
    )
    with pytest.raises(ParallelError, match=reason):
        load_pipeline(folder_of("demo w4"), tensor_parallel=fake_group(3))


def test_a_pipeline_without_a_plan_is_refused(fake_group, folder_of, monkeypatch):
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(FluxTransformer2DModel, "_tp_plan", None)
    with pytest.raises(ParallelError, match="no component has a tensor-parallel plan; run it on one rank"):
        load_pipeline(folder_of("demo w4"), tensor_parallel=fake_group(2))


PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", (2, 3, 4, 6, 8, 12, 24), 0.51),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("WanTransformer3DModel", (2, 4), 0.52),
    "zai-org/GLM-Image": ("GlmImageTransformer2DModel", (2, 4, 8, 16, 32), 0.52),
    "AIDC-AI/Ovis-Image-7B": ("OvisImageTransformer2DModel", (2, 3, 4, 6, 8, 12, 24), 0.51),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_can_be_shared_at_group_128(model, fake_group):
    import diffusers

    from quantkit.families.published import ROOT
    from quantkit_runtime.config import Scheme
    from quantkit_runtime.parallel.tensor import shard

    class_name, works, most = PUBLISHED[model]
    config = json.loads((ROOT / model / "transformer" / "config.json").read_text())

    def build():
        with torch.device("meta"):
            return getattr(diffusers, class_name).from_config(config)

    whole = build()
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    group = fake_group(5)
    with pytest.raises(ParallelError) as caught:
        shard(whole, group, lambda name: Scheme() if "blocks." in name else None)
    assert f"{', '.join(map(str, works))} ranks can share this model" in str(caught.value)
    torch.distributed.destroy_process_group()
    half = build()
    shard(half, fake_group(2), lambda name: Scheme() if "blocks." in name else None)
    assert sum(parameter.numel() for parameter in half.parameters()) / parameters < most


def test_a_group_of_weights_is_not_cut(fake_group):
    import diffusers

    from quantkit.families.published import ROOT
    from quantkit_runtime.config import Scheme
    from quantkit_runtime.parallel.tensor import shard

    config = json.loads((ROOT / "black-forest-labs/FLUX.1-dev/transformer/config.json").read_text())
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(config)
    reason = (
        r"to_out.0: in_features 3072 cannot be divided by 2 ranks: a rank's part must be a multiple of 1024 "
        r"\(group_size 1024\); 3 ranks can share this model"
    )
    with pytest.raises(ParallelError, match=reason):
        shard(model, fake_group(2), lambda _name: Scheme(group_size=1024))
