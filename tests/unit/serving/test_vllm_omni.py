"""The settings of a server in vLLM-Omni's words, and checkpoints that it could not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def _run(tmp_path, *arguments):
    """Run ``quantkit serve`` with a program named vllm that writes down how it was called."""
    record = tmp_path / "called.json"
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ.get('VLLM_API_KEY')], open({str(record)!r}, 'w'))\n"
    )
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "QUANTKIT_API_KEY": "secret"}
    ran = subprocess.run(
        [sys.executable, "-m", "quantkit.cli.main", "serve", *arguments, "--engine", "vllm-omni"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran, json.loads(record.read_text()) if record.exists() else None


def test_serve_becomes_vllm_and_says_what_is_lost_on_the_way(tmp_path):
    ran, called = _run(
        tmp_path, "demo", "--port", "8099", "--cfg-parallel", "2", "--tensor-parallel", "3",
        "--limit", "max_queue=3", "--compute", "16bit",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    arguments, key = called
    assert arguments[:3] == ["serve", str(quantkit.demo.path()), "--omni"]
    assert arguments[arguments.index("--port") + 1] == "8099"
    assert arguments[arguments.index("--cfg-parallel-size") + 1] == "2"
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "3"
    sampling = json.loads(arguments[arguments.index("--default-sampling-params") + 1])
    assert sampling["0"]["num_inference_steps"] == 20  # the recipe's
    assert key == "secret"
    assert "secret" not in ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith("not translated:")]
    assert [line.split(": ")[1] for line in told] == ["--compute 16bit", "--limit max_queue=3"]


def test_serve_does_not_start_vllm_with_a_checkpoint_that_it_cannot_load(tmp_path):
    folder = round_chat(build_chat(tmp_path / "chat"), tmp_path / "packed", group_size=16)
    ran, called = _run(tmp_path, str(folder))
    assert (ran.returncode, called) == (2, None)
    assert "group" in ran.stderr
