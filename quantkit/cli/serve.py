"""``quantkit serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.models import resolve_model
from quantkit.errors import MissingExtraError, UnsupportedModelError

_SERVER = "Server"
_HOW = "How to run"
_LIMITS = "Limits"
_DEMO_RECIPE = "demo-flux"
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
    ] = 30.0,
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
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Pictures that run together.", rich_help_panel=_HOW)
    ] = 4,
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
) -> None:
    """Serve a model through an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    Whether it is quantized is read from the model itself. ``python -m quantkit_runtime.server`` is the same server
    with the runtime alone.
    """
    from quantkit_runtime.server.options import make_settings, parse_defaults, parse_limits
    from quantkit_runtime.server.settings import read_api_keys

    folder = resolve_model(model)
    settings = make_settings(
        [(served_model_name or model, str(folder))],
        device=device,
        dtype=dtype,
        compute=compute,
        backend=backend,
        cfg_parallel=cfg_parallel,
        tensor_parallel=tensor_parallel,
        max_batch=max_batch,
        warm_up=warm_up,
        defaults=_sampling(folder, _DEMO_RECIPE if model == "demo" and recipe is None else recipe)
        | parse_defaults(default or []),
        limits=parse_limits(limit or []),
        host=host,
        port=port,
        api_keys=read_api_keys(api_key_file),
        allow_remote_media=allow_remote_media,
        state_dir=state_dir,
        drain_s=drain,
        log_format=log_format,
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
