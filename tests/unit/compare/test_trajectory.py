import numpy as np
import pytest
import torch

from quantkit.compare.trajectory import LatentStore, Trajectory, record
from quantkit.errors import CheckpointError

CALL = {"prompt": "a disc", "height": 16, "width": 16, "num_inference_steps": 5}


def test_the_noise_comes_first_and_every_step_follows(pipeline):
    steps = []
    trajectory = record(pipeline(), CALL, 7, on_step=lambda step, total: steps.append((step, total)))
    noise = torch.randn((3, 16, 16), generator=torch.Generator().manual_seed(7))
    assert trajectory.latents.shape == (6, 3, 16, 16)
    assert trajectory.latents.dtype == np.float32
    assert np.array_equal(trajectory.latents[0], noise.numpy())
    assert trajectory.timesteps == (1000, 999, 998, 997, 996)
    assert steps == [(step, 5) for step in range(1, 6)]
    assert len(trajectory.step_ms) == 4  # the first pays for warm-up
    assert sum(trajectory.step_ms) <= trajectory.total_s * 1e3


def test_the_image_is_rounded_to_8_bit_as_diffusers_does(pipeline):
    trajectory = record(pipeline(), CALL, 0)
    expected = (np.clip(trajectory.latents[-1] / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    assert np.array_equal(trajectory.frames, expected.transpose(1, 2, 0)[None])
    assert trajectory.frames_are_finite


def test_latents_are_copied_before_a_scheduler_writes_into_them(pipeline):
    class InPlace(type(pipeline())):
        def __call__(self, callback_on_step_end, **kwargs):
            def reuse(pipe, step, timestep, tensors):
                callback_on_step_end(pipe, step, timestep, tensors)
                tensors["latents"].mul_(1.0 + 1e-3)

            return super().__call__(callback_on_step_end=reuse, **kwargs)

    plain, reused = record(pipeline(), CALL, 0), record(InPlace(), CALL, 0)
    assert np.array_equal(plain.latents[1], reused.latents[1])


def test_the_first_bad_step_is_found(pipeline):
    assert record(pipeline(), CALL, 0).first_bad_step() is None
    trajectory = record(pipeline(bad_from_step=2), CALL, 0)
    assert trajectory.first_bad_step() == 3


def test_an_image_that_is_not_finite_is_noticed(pipeline):
    assert not record(pipeline(bad_image=True), CALL, 0).frames_are_finite


def test_the_scheduler_is_left_as_it_was_also_after_an_error(pipeline):
    pipe = pipeline()
    with pytest.raises(TypeError):
        record(pipe, CALL | {"width": "wide"}, 0)
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_without_a_scheduler_is_refused():
    with pytest.raises(CheckpointError, match="has no scheduler"):
        record(object(), {}, 0)


def test_a_pipeline_that_takes_no_step_is_refused(pipeline):
    with pytest.raises(CheckpointError, match="ran no denoising step"):
        record(pipeline(), CALL | {"num_inference_steps": 0}, 0)


@pytest.mark.parametrize("budget_bytes", [10**6, 0])
def test_kept_latents_come_back_the_same_from_memory_and_from_a_file(tmp_path, budget_bytes):
    latents = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    store = LatentStore(3, tmp_path, budget_bytes)
    for index, one in enumerate(latents):
        store.put(index, one)
    assert all(np.array_equal(store.get(index), latents[index]) for index in range(3))
    assert (store.file is not None) == (budget_bytes == 0)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_trajectory_with_bad_noise_starts_bad():
    latents = np.full((2, 3), np.inf, np.float32)
    assert Trajectory(latents, (1.0,), np.zeros((1, 1, 1, 3), np.uint8), True, (1.0,), 0.1).first_bad_step() == 0
