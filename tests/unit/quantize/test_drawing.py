"""The pipeline that auto-round gets to see."""

from types import SimpleNamespace

import pytest
import torch

from quantkit.families.registry import get_family
from quantkit.quantize.drawing import expose
from quantkit.recipe import Prompt


class Pipe:
    """A pipeline of two experts that notes how it is used."""

    def __init__(self):
        self.transformer, self.transformer_2 = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.components = {
            "transformer": self.transformer,
            "transformer_2": self.transformer_2,
            "tokenizer": "words",
        }
        self.calls, self.moves, self.offloads = [], [], []
        self.transformer_2.to = self.moves.append
        self.enable_model_cpu_offload = lambda **kwargs: self.offloads.append(kwargs)

    def set_progress_bar_config(self, **kwargs):
        assert kwargs == {"disable": True}

    def __call__(self, **kwargs):
        self.calls.append(kwargs)


@pytest.fixture
def exposed():
    def make(**changes):
        pipe = Pipe()
        job = SimpleNamespace(
            noise_seed=40, nsamples=2, call_kwargs={"height": 8}, devices=["cpu"], cache_on_host=False
        )
        vars(job).update(changes)
        prompts = [Prompt("a cat"), Prompt("a dog")]
        return pipe, expose(pipe, "transformer", get_family("wan2.2-t2v"), prompts, job)

    return make


def test_only_one_transformer_is_seen(exposed):
    pipe, seen = exposed()
    assert list(seen.components) == ["transformer"]
    assert seen.transformer is pipe.transformer


def test_each_prompt_starts_from_noise_of_its_own(exposed):
    pipe, seen = exposed()
    seen([0], guidance_scale=7.5, generator=None)
    seen([1], guidance_scale=7.5, generator=None)
    seeds = [call.pop("generator").initial_seed() for call in pipe.calls]
    assert seeds == [40, 41]
    assert pipe.calls == [{"prompt": text, "height": 8, "output_type": "latent"} for text in ("a cat", "a dog")]


def test_the_other_parts_make_room_when_the_last_prompt_is_drawn(exposed):
    pipe, seen = exposed(devices=["cuda:1"])
    seen([0])
    assert pipe.moves == ["cuda:1"]
    seen([1])
    assert pipe.moves == ["cuda:1", "cuda:1", "cpu"]


def test_with_inputs_on_the_host_the_whole_pipeline_is_offloaded(exposed):
    pipe, seen = exposed(devices=["cuda:1"], cache_on_host=True)
    seen.enable_model_cpu_offload(device="cuda:1")
    seen([0])
    seen([1])
    assert pipe.offloads == [{"device": "cuda:1"}]
    assert pipe.moves == []
