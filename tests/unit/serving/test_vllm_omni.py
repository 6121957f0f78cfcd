"""The settings of a server in vLLM-Omni's words, and checkpoints that it could not load."""

from __future__ import annotations

import json

import pytest
from tiny.chat import build_chat, round_chat

import quantkit.demo
from quantkit.errors import RecipeError, ServabilityError
from quantkit.serving.vllm_omni import Wanted, find_program, plan_launch


def _wanted(folder, **changes):
    return Wanted(**{"folder": folder, "name": "model", "host": "127.0.0.1", "port": 8091, **changes})


def test_settings_become_arguments_and_sampling_the_defaults_of_the_diffusion_stage():
    sampling = {"num_inference_steps": 20, "guidance_scale": 3.5}
    launch = plan_launch(_wanted(quantkit.demo.path(), cfg_parallel=2, tensor_parallel=2, sampling=sampling))
    assert launch.arguments[:4] == ("vllm", "serve", str(quantkit.demo.path()), "--omni")
    options = dict(zip(launch.arguments[4::2], launch.arguments[5::2], strict=True))
    assert json.loads(options.pop("--default-sampling-params")) == {"0": sampling}
    assert options == {
        "--host": "127.0.0.1", "--port": "8091", "--served-model-name": "model", "--dtype": "bfloat16",
        "--tensor-parallel-size": "2", "--cfg-parallel-size": "2",
    }  # fmt: skip
    assert launch.untranslated == ()
    assert launch.findings is None  # nothing is quantized, so there is nothing to check


def test_what_has_no_translation_is_named_with_its_value_and_the_reason():
    others = {"--compute": "fp8", "--limit": "max_queue=3", "--exact": True}
    launch = plan_launch(_wanted(quantkit.demo.path(), sampling={"fps": 16}, others=others))
    assert [line.partition(":")[0] for line in launch.untranslated] == [
        "--default fps=16", "--compute fp8", "--limit max_queue=3", "--exact",
    ]  # fmt: skip


def test_a_key_goes_into_the_environment_and_not_into_the_command_line():
    launch = plan_launch(_wanted(quantkit.demo.path(), api_keys=["secret", "other"]))
    assert launch.environment == {"VLLM_API_KEY": "secret"}
    assert "secret" not in " ".join(launch.arguments)
    assert "--api-key-file" in launch.untranslated[0]


def test_a_checkpoint_that_it_could_not_load_is_refused_with_what_hinders_it(tmp_path):
    folder = round_chat(build_chat(tmp_path / "chat"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["packing_format"] = "auto_round:other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServabilityError, match="packing_format"):
        plan_launch(_wanted(folder))


def test_guidance_of_a_chat_cannot_be_shared(tmp_path):
    with pytest.raises(RecipeError, match="--cfg-parallel"):
        plan_launch(_wanted(build_chat(tmp_path / "chat"), cfg_parallel=2))


def test_a_missing_vllm_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServabilityError, match="vllm is not on PATH"):
        find_program()
