"""Pipelines whose denoisers run as CUDA graphs draw, bit for bit, what they draw without."""

import pytest
import torch

from quantkit_runtime import load_pipeline
from quantkit_runtime.errors import QuantkitRuntimeError

pytestmark = pytest.mark.gpu

CALLS = {
    "wan_t2v": {"height": 32, "width": 32, "num_frames": 5},
    "wan_ti2v": {"height": 64, "width": 64, "num_frames": 5},
    "ovis_image": {"height": 32, "width": 32},
}


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def draw(pipeline, prompt="a red circle", seed=0, **options):
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    )
    return made.images if hasattr(made, "images") else made.frames


def test_packed_flux_draws_the_same_in_every_size_and_batch(rtn_checkpoint):
    plain, recorded = (load_pipeline(rtn_checkpoint, device="cuda", cuda_graphs=graphs) for graphs in (False, True))
    for again in range(2):
        for size in (32, 64):
            for images in (1, 2):
                options = {
                    "height": size,
                    "width": size,
                    "num_images_per_prompt": images,
                    "max_sequence_length": 16,
                    "seed": again,
                }
                assert torch.equal(draw(recorded, **options), draw(plain, **options))
    prompt = {"height": 32, "width": 32, "max_sequence_length": 16, "prompt": "two blue squares"}
    assert torch.equal(draw(recorded, **prompt), draw(plain, **prompt))


def test_compiled_packed_flux_draws_the_same(rtn_checkpoint):
    plain, recorded = (
        load_pipeline(rtn_checkpoint, device="cuda", compile=True, cuda_graphs=graphs) for graphs in (False, True)
    )
    for seed in range(2):
        options = {"height": 64, "width": 64, "max_sequence_length": 16, "seed": seed}
        assert torch.equal(draw(recorded, **options), draw(plain, **options))


@pytest.mark.parametrize("model", CALLS)
def test_every_family_that_can_be_recorded_draws_the_same(tiny_model, model):
    plain, recorded = (
        load_pipeline(tiny_model(model), device="cuda", cuda_graphs=graphs) for graphs in (False, True)
    )
    for seed in range(2):
        assert torch.equal(draw(recorded, seed=seed, **CALLS[model]), draw(plain, seed=seed, **CALLS[model]))


def test_glm_image_which_keeps_a_cache_is_refused_in_one_line(tiny_model):
    pipeline = load_pipeline(tiny_model("glm_image"), device="cuda", cuda_graphs=True)
    with pytest.raises(QuantkitRuntimeError, match=r"cuda_graphs: transformer: an argument is a \w*KVCache"):
        draw(pipeline, height=64, width=64)


def test_memory_does_not_grow_from_picture_to_picture(rtn_checkpoint):
    pipeline = load_pipeline(rtn_checkpoint, device="cuda", cuda_graphs=True)
    options = {"height": 64, "width": 64, "max_sequence_length": 16}
    for seed in range(3):
        draw(pipeline, seed=seed, **options)
    before = torch.cuda.memory_allocated()
    for seed in range(10):
        draw(pipeline, seed=seed, **options)
    assert torch.cuda.memory_allocated() == before


def test_a_pipeline_that_moved_away_and_back_is_recorded_anew(rtn_checkpoint):
    pipeline = load_pipeline(rtn_checkpoint, device="cuda", cuda_graphs=True)
    options = {"height": 32, "width": 32, "max_sequence_length": 16}
    wanted = draw(pipeline, **options)
    pipeline.to("cpu")
    taken = torch.full((2**20,), float("nan"), device="cuda")  # where the weights were
    pipeline.to("cuda")
    assert torch.equal(draw(pipeline, **options), wanted)
    del taken


def test_a_step_that_waits_for_the_device_is_an_error_and_leaves_the_device_usable():
    from functools import partial

    from quantkit_runtime.graphs import CudaGraph, record_calls

    class Waits(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    model = Waits(8, 8, device="cuda")
    record_calls(model, "model", partial(CudaGraph, torch.device("cuda", 0), torch.cuda.graph_pool_handle()))
    with torch.no_grad():
        x = torch.ones(2, 8, device="cuda")
        model(x)
        with pytest.raises(QuantkitRuntimeError, match="model: cannot be recorded"):
            model(x)
        assert torch.randn(2**20, device="cuda").std().item() > 0.9
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
