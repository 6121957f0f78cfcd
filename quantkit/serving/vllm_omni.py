"""vLLM-Omni: whether it can load a checkpoint, and quantkit's settings in its words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint import open_model
from quantkit.errors import RecipeError, ServabilityError
from quantkit.inspect.servability import Finding, check_servability

_PROGRAM = "vllm"
# Names of sampling keys that vLLM-Omni takes under the same name, as defaults of a diffusion stage.
_SAMPLING = frozenset(
    {
        "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2",
        "true_cfg_scale", "negative_prompt", "max_sequence_length",
    }
)  # fmt: skip
_DIFFERENCES = (
    "video jobs: it keeps them in memory, so a restart loses them",
    "/ready: it has none, and its /health stays 200 while an engine hangs",
)
_FETCHES = "remote media: it fetches the URLs that chats name, without --allow-remote-media"


@dataclass(frozen=True)
class Launch:
    """How to start vLLM-Omni.

    Attributes:
        arguments: The command line, its program first.
        environment: Variables beside those of this process; secrets are here, where ``ps`` does not show them.
        findings: What the servability check found, warnings among them; None for a model that is not quantized.
        untranslated: What was asked for and is not said to it, each with the reason.
        differences: What it does otherwise than quantkit's own server.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    findings: tuple[Finding, ...] | None
    untranslated: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a user asks of a server, in quantkit's words.

    Attributes:
        folder: Of the model.
        name: In requests.
        host: Address to bind.
        port: Port to bind.
        dtype: Of 16 bit weights and activations.
        api_keys: That open the API.
        cfg_parallel: Ranks that share guidance.
        tensor_parallel: Ranks that share each layer.
        sampling: Defaults of request fields.
        others: Every other option that was given, as typed, with its value; True for a flag.
        fetches_remote_media: Whether URLs in chats may be fetched.
    """

    folder: Path
    name: str
    host: str
    port: int
    dtype: str = "bfloat16"
    api_keys: Sequence[str] = ()
    cfg_parallel: int = 1
    tensor_parallel: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    fetches_remote_media: bool = False


_WHY_NOT = {
    "--compute": "vLLM-Omni chooses the arithmetic of packed layers itself",
    "--backend": "vLLM-Omni chooses the kernels of packed layers itself",
    "--device": "vLLM-Omni runs on the devices that it was built for; CUDA_VISIBLE_DEVICES chooses among them",
    "--state-dir": "it keeps video jobs in memory",
    "--no-warm-up": "it has its own start",
    "--exact": "its batches have no such mode",
    "--max-batch": "it batches requests by rules of its own",
    "--reference": "it serves one model; start it once more for the other",
    "--drain": "it ends running requests in its own time",
    "--log-format": "it writes logs in its own format",
    "--limit": "it has no such limits, and no bound of its queue",
}


def plan_launch(wanted: Wanted) -> Launch:
    """Check a checkpoint and translate the settings.

    Raises:
        ServabilityError: vLLM-Omni could not load it, or would compute something else.
        RecipeError: A setting has no meaning for this model.
        CheckpointError: The folder is no model.
    """
    findings = _check(wanted.folder)
    is_pipeline = (wanted.folder / "model_index.json").is_file()
    arguments = [
        _PROGRAM, "serve", str(wanted.folder), "--omni", "--host", wanted.host, "--port", str(wanted.port),
        "--served-model-name", wanted.name,
    ]  # fmt: skip
    arguments += ["--dtype", wanted.dtype]
    if wanted.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(wanted.tensor_parallel)]
    if wanted.cfg_parallel > 1:
        if not is_pipeline:
            raise RecipeError("--cfg-parallel: a model that writes text has no guidance to share")
        arguments += ["--cfg-parallel-size", str(wanted.cfg_parallel)]
    untranslated = []
    given = {key: value for key, value in wanted.sampling.items() if is_pipeline and key in _SAMPLING}
    if given:
        arguments += ["--default-sampling-params", json.dumps({"0": given}, sort_keys=True)]
    untranslated += [
        f"--default {key}={value}: it takes no default of this field; send it with each request"
        for key, value in wanted.sampling.items()
        if key not in given
    ]
    environment = {}
    if wanted.api_keys:
        environment["VLLM_API_KEY"] = wanted.api_keys[0]
        if len(wanted.api_keys) > 1:
            untranslated.append(f"--api-key-file: it knows one key, the first of {len(wanted.api_keys)}")
    untranslated += [f"{_shown(option, value)}: {_WHY_NOT[option]}" for option, value in wanted.others.items()]
    differences = _DIFFERENCES if wanted.fetches_remote_media else (*_DIFFERENCES, _FETCHES)
    return Launch(tuple(arguments), environment, findings, tuple(untranslated), differences)


def find_program() -> str:
    """Return the path of ``vllm``.

    Raises:
        ServabilityError: It is not on PATH.
    """
    found = shutil.which(_PROGRAM)
    if found is None:
        raise ServabilityError(
            "vllm is not on PATH: install vLLM and vLLM-Omni, best in an environment of their own, and put it there"
        )
    return found


def _check(folder: Path) -> tuple[Finding, ...] | None:
    if all(part.quantization is None for part in open_model(folder).components.values()):
        return None
    findings = check_servability(folder, "vllm-omni")
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise ServabilityError(
            "\n".join(
                f"{one.model + ': ' if one.model else ''}{one.place}: {one.what}; {one.mend}" for one in errors
            )
        )
    return tuple(findings)


def _shown(option: str, value: Any) -> str:
    return option if value is True else f"{option} {value}"
