"""The estimate of calibration memory, and what a run that does not fit is told."""

import pytest

from quantkit.errors import QuantizationError
from quantkit.quantize import memory
from quantkit.quantize.memory import CalibrationMemory, cache_fits, check_memory
from quantkit.quantize.run import prepare, quantize
from quantkit.recipe import load_recipe


@pytest.fixture
def prepared(flux_model, quantize_tiny):
    return lambda *overrides: prepare(load_recipe(quantize_tiny.recipe, ("scheme.iters=2", *overrides)), flux_model)


def test_the_estimate_counts_samples_steps_branches_and_tokens(prepared):
    tokens, width, head = 64 + 16, 128, 32
    per_call = 2 * tokens * width + 2 * width + 8 * tokens * head
    one = prepared().memory
    assert (one.samples, one.calls) == (2, 2)
    assert one.cached_nbytes == 2 * 2 * 2 * per_call
    assert one.peak_nbytes == one.cached_nbytes + 3 * 2 * 2 * 2 * tokens * width
    assert prepared("calibration.num_inference_steps=6").memory.cached_nbytes == 3 * one.cached_nbytes
    assert prepared("calibration.true_cfg_scale=2.0").memory.cached_nbytes == 2 * one.cached_nbytes
    assert prepared("calibration.height=64").memory.cached_nbytes > 1.5 * one.cached_nbytes


def test_rounding_needs_no_calibration_memory(prepared):
    assert prepared("scheme.iters=0").memory is None


def test_a_run_that_does_not_fit_says_what_to_lower_before_it_does_anything(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.raises(
        QuantizationError,
        match=r"calibration needs about 0\.0 GB of memory for 2 samples x 4 calls, 0\.0 GB are available; lower "
        r"scheme\.nsamples or calibration\.num_inference_steps or calibration\.true_cfg_scale or "
        r"calibration\.height or calibration\.width or calibration\.max_sequence_length",
    ):
        quantize(prepared("calibration.true_cfg_scale=2.0"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_peak_counts_where_blocks_are_tuned_from_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 350)
    estimate = CalibrationMemory(samples=1, calls=1, cached_nbytes=200, peak_nbytes=300, model_nbytes=100)
    check_memory(estimate, ["scheme.nsamples"], cache_on_host=False)
    with pytest.raises(QuantizationError, match=r"lower scheme\.nsamples"):
        check_memory(estimate, ["scheme.nsamples"], cache_on_host=True)


def test_inputs_stay_on_a_device_that_has_room_for_them(monkeypatch):
    import types

    import torch

    device = types.SimpleNamespace(get_device_properties=lambda _: types.SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    estimate = CalibrationMemory(samples=1, calls=1, cached_nbytes=300, peak_nbytes=800, model_nbytes=100)
    assert cache_fits(estimate, "cuda:0")
    assert not cache_fits(CalibrationMemory(1, 1, 300, 801, 100), "cuda:0")
    assert not cache_fits(None, "cuda:0")
    assert cache_fits(None, "cpu")


def test_a_containers_limit_counts_without_its_page_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = memory.available_memory()
    assert machine > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 3000\nshmem 500\n")
    assert memory.available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 3500
