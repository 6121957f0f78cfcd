"""Command line of the server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from quantkit_runtime.choice import check_choice, check_cuda_graphs, is_packed
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Cluster, Limits, Settings, SettingsError, read_api_keys

_DTYPES = ("bfloat16", "float16", "float32")


def parse(arguments: list[str]) -> Settings:
    """Return the settings that a command line gives.

    Raises:
        SettingsError: An option cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m quantkit_runtime.server", description="Serve a model through an OpenAI-compatible API."
    )
    parser.add_argument("model", help="folder or hub id of a pipeline or model, quantized or not")
    parser.add_argument("--served-model-name", help="name in requests; default: the model as given")
    parser.add_argument("--reference", help="a second model, which the page at / shows beside the first")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8091, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--api-key-file", type=Path, help="file with one key per line")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES)
    parser.add_argument("--compute", default="auto", help="16bit, fp8 or auto")
    parser.add_argument("--backend", default="auto", help="kernels of packed layers")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="record denoising steps and replay them")
    parser.add_argument("--cfg-parallel", type=int, default=1, choices=[1, 2], help="ranks for guidance")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share the weights")
    parser.add_argument(
        "--exact", action="store_true", help="greedy chats do not depend on the load, but are slower"
    )
    parser.add_argument(
        "--max-batch", type=int, help="pictures or chats that run together (default: 4 pictures, 8 chats)"
    )
    parser.add_argument("--default", action="append", default=[], metavar="FIELD=VALUE", help="of a request field")
    parser.add_argument("--allow-remote-media", action="store_true", help="fetch URLs that requests name")
    parser.add_argument("--state-dir", type=Path, help="folder of video jobs")
    parser.add_argument("--drain", type=float, default=30.0, help="seconds for running requests after SIGTERM")
    parser.add_argument("--log-format", default="json", choices=["json", "text"])
    parser.add_argument("--no-warm-up", action="store_true", help="do not run a small request first")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help=_limits_help())
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="where the models run")
    parser.add_argument("--ray-address", help="of a Ray cluster; default: one on this machine")
    parser.add_argument("--min-replicas", type=int, default=1, help="with --engine ray")
    parser.add_argument("--max-replicas", type=int, help="with --engine ray; default: --min-replicas")
    parser.add_argument("--target-requests", type=float, default=2.0, help="per replica, with --engine ray")
    given = parser.parse_args(arguments)
    models = [(given.served_model_name or given.model, given.model)]
    if given.reference is not None:
        models.append((given.reference, given.reference))
    loading = ModelSpec(
        given.model,
        device=given.device,
        dtype=given.dtype,
        compute=given.compute,
        backend=given.backend,
        compile=given.compile,
        cuda_graphs=given.cuda_graphs,
        cfg_parallel=given.cfg_parallel,
        tensor_parallel=given.tensor_parallel,
        exact=given.exact,
        max_batch=given.max_batch,
        warm_up=not given.no_warm_up,
        defaults=parse_defaults(given.default),
    )
    return make_settings(
        models,
        loading,
        reference=given.reference,
        limits=parse_limits(given.limit),
        host=given.host,
        port=given.port,
        api_keys=read_api_keys(given.api_key_file),
        allow_remote_media=given.allow_remote_media,
        state_dir=given.state_dir,
        drain_s=given.drain,
        log_format=given.log_format,
        cluster=make_cluster(given.ray_address, given.min_replicas, given.max_replicas, given.target_requests)
        if given.engine == "ray"
        else None,
    )


def make_settings(models: list[tuple[str, str]], loading: ModelSpec, **server: Any) -> Settings:
    """Return settings of one or more models that are loaded alike.

    Args:
        models: Name and path of each.
        loading: How they are loaded, whatever its path; the device may be ``auto``. Compute mode and backend go to
            those that are packed.
        server: The rest of `Settings`.

    Raises:
        SettingsError: An option cannot be used, or two models have one name.
        BackendUnavailableError: This machine does not have the device (a cluster's may), or compute mode or backend
            are unknown or have no packed layer to go to, or CUDA graphs cannot be had.
        CheckpointFormatError: A model cannot be looked at for that.
    """
    if loading.dtype not in _DTYPES:
        raise SettingsError(f"--dtype {loading.dtype}: use {', '.join(_DTYPES)}")
    for flag, value in (("--max-batch", loading.max_batch), ("--tensor-parallel", loading.tensor_parallel)):
        if value is not None and value < 1:
            raise SettingsError(f"{flag} {value}: must be at least 1")
    if server["log_format"] not in ("json", "text"):
        raise SettingsError(f"--log-format {server['log_format']}: use json or text")
    if len({name for name, _ in models}) < len(models):
        raise SettingsError(
            f"--reference {models[-1][0]}: is served already; rename the first by --served-model-name"
        )
    device = _device() if loading.device == "auto" else loading.device
    if device != "cpu" and server["cluster"] is None:  # importing torch takes time and memory
        from quantkit_runtime.load import available_device

        available_device(device)
    if loading.cuda_graphs:
        check_cuda_graphs(device, shares_weights=loading.tensor_parallel > 1)
    loading = dataclasses.replace(loading, device=device)
    unpacked = _unpacked(models, loading)
    plain = dataclasses.replace(loading, compute="auto", backend="auto")
    return Settings(
        models={
            name: dataclasses.replace(plain if name in unpacked else loading, path=path) for name, path in models
        },
        **server,
    )


def _unpacked(models: list[tuple[str, str]], loading: ModelSpec) -> set[str]:
    """Return the names of models that a chosen compute mode or backend does not go to; it must go to another."""
    if loading.compute == "auto" and loading.backend == "auto":
        return set()
    from quantkit_runtime.load import local_folder

    folders = {name: local_folder(path) for name, path in models}
    check_choice(*folders.values(), compute=loading.compute, backend=loading.backend)
    return {name for name, folder in folders.items() if not is_packed(folder)}


def make_cluster(
    address: str | None, min_replicas: int, max_replicas: int | None, target_requests: float
) -> Cluster:
    """Return a cluster as options give it; without a greatest number of replicas, there are always the least.

    Raises:
        SettingsError: The numbers contradict each other.
    """
    most = min_replicas if max_replicas is None else max_replicas
    return Cluster(address, min_replicas, most, target_requests)


def parse_defaults(texts: list[str]) -> dict[str, Any]:
    """Return the values of ``FIELD=VALUE`` texts: numbers as numbers.

    Raises:
        SettingsError: One has another form.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise SettingsError(f"--default {text}: write FIELD=VALUE, e.g. num_inference_steps=20")
        try:
            number = json.loads(value)
        except ValueError:
            number = value
        found[name] = number if isinstance(number, (int, float)) and not isinstance(number, bool) else value
    return found


def parse_limits(texts: list[str]) -> Limits:
    """Return the limits that ``NAME=VALUE`` texts give.

    Raises:
        SettingsError: One has another form, no known name or no positive number.
    """
    known: dict[str, type[int] | type[float]] = {name: type(value) for name, value in vars(Limits()).items()}
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in known:
            raise SettingsError(f"--limit {text}: write NAME=VALUE with one of {', '.join(known)}")
        try:
            found[name] = known[name](value)
        except ValueError:
            found[name] = 0
        if not 0 < found[name] < math.inf:
            raise SettingsError(f"--limit {text}: must be a positive {'whole ' * (known[name] is int)}number")
    return Limits(**found)


def _limits_help() -> str:
    return "repeatable: " + ", ".join(f"{name}={value}" for name, value in vars(Limits()).items())


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"
