"""Recorded calls, with a graph that repeats its work on the CPU in the place of a CUDA graph."""

import pytest
import torch
import torch.distributed as dist
from repeated_work import RepeatedWork
from torch import nn
from torch.utils._pytree import tree_leaves

from quantkit_runtime import load
from quantkit_runtime.choice import check_cuda_graphs
from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError, QuantkitRuntimeError
from quantkit_runtime.graphs import record_calls


class Denoiser(nn.Module):
    """Counts how often Python runs it."""

    is_cache_enabled = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.calls = 0

    def forward(self, hidden_states, timestep=None, *, scale=1.0, extra=None, return_dict=True):
        self.calls += 1
        out = self.weight * scale * hidden_states + (0 if timestep is None else timestep)
        for tensor in (extra or {}).values():
            out = out + tensor
        return {"sample": out} if return_dict else (out,)


@pytest.fixture(autouse=True)
def _fresh():
    RepeatedWork.made = 0
    with torch.no_grad():
        yield


@pytest.fixture
def denoiser():
    model = Denoiser()
    record_calls(model, "transformer", RepeatedWork)
    return model


def test_every_call_gives_what_the_model_would_and_python_does_not_run_it(denoiser):
    plain = Denoiser()
    for step in range(6):
        given = {"timestep": torch.tensor([float(step)]), "extra": {"a": torch.tensor(step * 10.0)}}
        x = torch.arange(3.0) + step
        found = denoiser(x, **given, return_dict=False)
        assert torch.equal(found[0], plain(x, **given, return_dict=False)[0])
    assert RepeatedWork.made == 1
    assert plain.calls == 6
    # The first, the recording, and the stand-in's own repetitions of five steps.
    assert denoiser.calls == 1 + 1 + 5


def test_results_are_the_callers_own(denoiser):
    results = [denoiser(torch.full((2,), float(step)))["sample"] for step in range(5)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(5)},
        {"x": torch.ones(3, dtype=torch.float64)},
        {"scale": 3.0},
        {"scale": 1},
        {"timestep": torch.ones(1)},
        {"return_dict": False},
        {"extra": {"b": torch.ones(1)}},
    ],
    ids=str,
)
def test_calls_that_differ_in_more_than_values_are_recorded_apart(denoiser, other):
    plain = Denoiser()
    first = {"x": torch.ones(3), "scale": 1.0, "extra": {"a": torch.ones(1)}}
    for _ in range(4):
        for given in (first, first | other):
            options = dict(given)
            x = options.pop("x")
            found, wanted = denoiser(x, **options), plain(x, **options)
            assert type(found) is type(wanted)
            assert torch.equal(tree_leaves(found)[0], tree_leaves(wanted)[0])
    assert RepeatedWork.made == 2


def test_a_weight_that_changes_in_its_place_counts(denoiser):
    x = torch.ones(2)
    for _ in range(3):
        denoiser(x)
    denoiser.weight.copy_(torch.tensor([5.0]))
    assert denoiser(x)["sample"].tolist() == [5.0, 5.0]


def test_a_model_that_moves_is_recorded_anew(denoiser):
    x = torch.ones(2)
    for _ in range(3):
        denoiser(x)
    denoiser.to(torch.float64)
    for _ in range(3):
        assert denoiser(x)["sample"].dtype == torch.float64
    assert RepeatedWork.made == 2


def test_the_recording_that_was_not_used_for_longest_makes_room(denoiser):
    for size in range(1, 10):
        for _ in range(2):
            denoiser(torch.ones(size))
    assert RepeatedWork.made == 9
    denoiser(torch.ones(9))
    denoiser(torch.ones(2))
    assert RepeatedWork.made == 9
    for _ in range(2):
        denoiser(torch.ones(1))
    assert RepeatedWork.made == 10


def test_inference_mode_may_change_between_calls(denoiser):
    with torch.inference_mode():
        for _ in range(3):
            denoiser(torch.ones(2))
    for _ in range(3):
        assert denoiser(torch.ones(2))["sample"].tolist() == [2.0, 2.0]


def test_what_a_recording_would_not_see_is_refused_by_name(denoiser):
    with pytest.raises(QuantkitRuntimeError, match="transformer: an argument is a list_iterator, which may change"):
        denoiser(torch.ones(2), scale=iter([]))
    with pytest.raises(QuantkitRuntimeError, match="an input is on meta, the model on cpu"):
        denoiser(torch.ones(2, device="meta"))
    with torch.enable_grad(), pytest.raises(QuantkitRuntimeError, match="gradients are on"):
        denoiser(torch.ones(2))
    denoiser.is_cache_enabled = True
    with pytest.raises(QuantkitRuntimeError, match="it has a step cache; load it without cuda_graphs"):
        denoiser(torch.ones(2))


def test_work_that_cannot_be_recorded_is_an_error_that_says_why():
    class Broken(RepeatedWork):
        def record(self, _work):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = Denoiser()
    record_calls(model, "transformer", Broken)
    model(torch.ones(2))
    with pytest.raises(QuantkitRuntimeError) as caught:
        model(torch.ones(2))
    assert str(caught.value) == (
        "cuda_graphs: transformer: cannot be recorded: operation not permitted when stream is capturing; load it "
        "without cuda_graphs"
    )


def test_other_devices_and_shared_weights_are_refused_before_loading():
    with pytest.raises(BackendUnavailableError, match="CUDA graphs need a CUDA device, not cpu; leave them out"):
        load.load_pipeline("./nowhere", device="cpu", cuda_graphs=True)
    with pytest.raises(BackendUnavailableError, match="leave them out, or tensor parallelism"):
        check_cuda_graphs("cuda", shares_weights=True)


def test_a_rank_that_shares_its_weights_with_none_may_record(monkeypatch):
    """As those of CFG-parallel, which load with a group of one."""
    monkeypatch.setattr(load, "available_device", torch.device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(CheckpointFormatError, match="not a folder"):
            load.load_pipeline("./nowhere", device="cuda", cuda_graphs=True, tensor_parallel=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
