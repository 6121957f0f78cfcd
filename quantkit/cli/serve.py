"""``quantkit serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantkit.cli.models import resolve_model
from quantkit.errors import MissingExtraError, UnsupportedModelError

_SERVER = "Server"
_HOW = "How to run"
_LIMITS = "Limits"
_GROWING = "Growing"
_DEMO_RECIPE = "demo-flux"
_DRAIN_S = 30.0
_SAMPLING = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "negative_prompt",
    "max_sequence_length",
)


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: path, hub id or 'demo'.")],
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name in requests; default: the model as given.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="A second model, which the page at / shows beside the first."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Its sampling is the default; else the model's own recipe's."),
    ] = None,
    default: Annotated[
        list[str] | None,
        typer.Option(
            "--default", metavar="FIELD=VALUE", help="Value of a field that requests leave out; repeatable."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to bind; others than loopback need a key.", rich_help_panel=_SERVER),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", rich_help_panel=_SERVER)] = 8091,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="File with one API key per line; default: the environment's QUANTKIT_API_KEY.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allow_remote_media: Annotated[
        bool,
        typer.Option("--allow-remote-media", help="Fetch URLs that chats name.", rich_help_panel=_SERVER),
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="Folder of video jobs.", rich_help_panel=_SERVER)
    ] = None,
    drain: Annotated[
        float,
        typer.Option("--drain", help="Seconds for running requests after SIGTERM.", rich_help_panel=_SERVER),
    ] = _DRAIN_S,
    log_format: Annotated[
        str, typer.Option("--log-format", help="text or json.", rich_help_panel=_SERVER)
    ] = "text",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, xpu ...", rich_help_panel=_HOW)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16 or float32.", rich_help_panel=_HOW)
    ] = "bfloat16",
    compute: Annotated[
        str, typer.Option("--compute", help="Packed layers: auto, 16bit or fp8.", rich_help_panel=_HOW)
    ] = "auto",
    backend: Annotated[
        str, typer.Option("--backend", help="Kernels of packed layers: auto, or one by name.", rich_help_panel=_HOW)
    ] = "auto",
    cfg_parallel: Annotated[
        int,
        typer.Option("--cfg-parallel", min=1, max=2, help="2: guidance on two ranks.", rich_help_panel=_HOW),
    ] = 1,
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel", min=1, help="Ranks that share the weights.", rich_help_panel=_HOW),
    ] = 1,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Greedy chats do not depend on the load, but are slower.", rich_help_panel=_HOW
        ),
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            min=1,
            help="Pictures or chats that run together; default: 4 pictures, 8 chats.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    warm_up: Annotated[
        bool,
        typer.Option("--warm-up/--no-warm-up", help="Run a small request before the first.", rich_help_panel=_HOW),
    ] = True,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=VALUE",
            help="max_queue, request_timeout_s, max_pixels, max_frames, max_steps, max_tokens ...",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray", "vllm-omni"],
        typer.Option("--engine", help="What runs the models.", rich_help_panel=_GROWING),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a Ray cluster; default: one here.", rich_help_panel=_GROWING),
    ] = None,
    min_replicas: Annotated[
        int, typer.Option("--min-replicas", min=1, help="With ray.", rich_help_panel=_GROWING)
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option("--max-replicas", help="With ray; default: --min-replicas.", rich_help_panel=_GROWING),
    ] = None,
    target_requests: Annotated[
        float,
        typer.Option("--target-requests", help="Per replica, with ray.", rich_help_panel=_GROWING),
    ] = 2.0,
) -> None:
    """Serve a model through an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    Whether it is quantized is read from the model itself. ``python -m quantkit_runtime.server`` is the same server
    with the runtime alone.
    """
    from quantkit_runtime.server.options import make_cluster, make_settings, parse_defaults, parse_limits
    from quantkit_runtime.server.protocol import ModelSpec
    from quantkit_runtime.server.settings import read_api_keys

    folder = resolve_model(model)
    name = served_model_name or model
    defaults = _sampling(folder, _DEMO_RECIPE if model == "demo" and recipe is None else recipe)
    defaults |= parse_defaults(default or [])
    api_keys = read_api_keys(api_key_file)
    if engine == "vllm-omni":
        from quantkit.cli.vllm_omni import start
        from quantkit.serving.vllm_omni import Wanted

        others = {
            "--reference": reference,
            "--compute": compute if compute != "auto" else None,
            "--backend": backend if backend != "auto" else None,
            "--device": device if device != "auto" else None,
            "--exact": exact or None,
            "--max-batch": max_batch,
            "--no-warm-up": None if warm_up else True,
            "--state-dir": state_dir,
            "--drain": drain if drain != _DRAIN_S else None,
            "--log-format": log_format if log_format != "text" else None,
            "--limit": " --limit ".join(limit) if limit else None,
        }
        wanted = Wanted(
            folder,
            name,
            host,
            port,
            dtype=dtype,
            api_keys=api_keys,
            cfg_parallel=cfg_parallel,
            sampling=defaults,
            others={option: value for option, value in others.items() if value is not None},
            fetches_remote_media=allow_remote_media,
        )
        start(wanted)
    models = [(name, str(folder))]
    if reference is not None:
        models.append((reference, str(resolve_model(reference))))
    loading = ModelSpec(
        str(folder),
        device=device,
        dtype=dtype,
        compute=compute,
        backend=backend,
        cfg_parallel=cfg_parallel,
        tensor_parallel=tensor_parallel,
        exact=exact,
        max_batch=max_batch,
        warm_up=warm_up,
        defaults=defaults,
    )
    settings = make_settings(
        models,
        loading,
        reference=reference,
        limits=parse_limits(limit or []),
        host=host,
        port=port,
        api_keys=api_keys,
        allow_remote_media=allow_remote_media,
        state_dir=state_dir,
        drain_s=drain,
        log_format=log_format,
        cluster=make_cluster(ray_address, min_replicas, max_replicas, target_requests) if engine == "ray" else None,
    )
    try:
        from quantkit_runtime.server.run import serve
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error
    serve(settings)


def _sampling(folder: Path, recipe: str | None) -> dict[str, Any]:
    """Return the sampling of a recipe, of the model's own, or else of its family; nothing of an unknown family."""
    from quantkit.checkpoint import open_pipeline
    from quantkit.families.registry import detect
    from quantkit.recipe import find_recipe, load_recipe, recipe_of

    loaded = load_recipe(find_recipe(recipe)) if recipe is not None else recipe_of(folder)
    try:
        family = detect(open_pipeline(folder))
    except UnsupportedModelError:
        return {}
    sampling = family.sampling_for(*([loaded.recipe.sampling] if loaded is not None else []))
    return {name: value for name, value in sampling.given().items() if name in _SAMPLING}
