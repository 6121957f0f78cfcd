"""``quantkit serve``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.cli import options
from quantkit.cli.models import resolve_model, sampling_recipe
from quantkit.cli.sampling import sampling_of
from quantkit.errors import MissingExtraError, RecipeError, UnsupportedModelError

if TYPE_CHECKING:
    from quantkit.checkpoint import ModelFolder
    from quantkit.recipe import LoadedRecipe
    from quantkit.recipe.schema import Sampling

_SERVER = "Server"
_LIMITS = "Limits"
_GROWING = "Growing"
_DRAIN_S = 30.0
_TARGET_REQUESTS = 2.0


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
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8091,
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
    device: options.Device = "auto",
    dtype: options.Dtype = "bfloat16",
    compute: options.Compute = "auto",
    backend: options.Backend = "auto",
    compile_blocks: options.Compile = False,
    cuda_graphs: options.CudaGraphs = False,
    cfg_parallel: Annotated[
        int,
        typer.Option("--cfg-parallel", min=1, max=2, help="2: guidance on two ranks.", rich_help_panel=options.HOW),
    ] = 1,
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel", min=1, help="Ranks that share the weights.", rich_help_panel=options.HOW),
    ] = 1,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Greedy chats do not depend on the load, but are slower.", rich_help_panel=options.HOW
        ),
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            min=1,
            help="Pictures or chats that run together; default: 4 pictures, 8 chats.",
            rich_help_panel=options.HOW,
        ),
    ] = None,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up", help="Run a small request before the first.", rich_help_panel=options.HOW
        ),
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
    ] = _TARGET_REQUESTS,
) -> None:
    """Serve a model through an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    Whether it is quantized is read from the model itself. The same server comes with the runtime alone, as
    python -m quantkit_runtime.server.
    """
    from quantkit.checkpoint import open_model
    from quantkit_runtime.server.options import make_cluster, make_settings, parse_defaults, parse_limits
    from quantkit_runtime.server.protocol import ModelSpec
    from quantkit_runtime.server.settings import read_api_keys

    folder = resolve_model(model)
    name = served_model_name or model
    opened = open_model(folder)
    given = parse_defaults(default or [])
    defaults = _sampling(opened, sampling_recipe(model, folder, recipe), _check_defaults(given)) | given
    if engine != "ray":
        _refuse_ray_options(ray_address, min_replicas, max_replicas, target_requests)
    api_keys = read_api_keys(api_key_file)
    if engine == "vllm-omni":
        from quantkit.cli.vllm_omni import start
        from quantkit.serving.vllm_omni import Wanted

        others = {
            "--reference": reference,
            "--compute": compute if compute != "auto" else None,
            "--backend": backend if backend != "auto" else None,
            "--device": device if device != "auto" else None,
            "--compile": compile_blocks or None,
            "--cuda-graphs": cuda_graphs or None,
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
            tensor_parallel=tensor_parallel,
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
        compile=compile_blocks,
        cuda_graphs=cuda_graphs,
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


def _check_defaults(given: Mapping[str, Any]) -> Sampling:
    """Refuse a default that no request could give either, before a model is loaded for it."""
    from quantkit.recipe.schema import Sampling

    fields = {name: value for name, value in given.items() if name in Sampling.model_fields}
    return sampling_of("--default ", **fields)


def _refuse_ray_options(
    address: str | None, min_replicas: int, max_replicas: int | None, target_requests: float
) -> None:
    changed = {
        "--ray-address": address is not None,
        "--min-replicas": min_replicas != 1,
        "--max-replicas": max_replicas is not None,
        "--target-requests": target_requests != _TARGET_REQUESTS,
    }
    if names := [option for option, given in changed.items() if given]:
        raise RecipeError(f"{', '.join(names)}: only --engine ray grows; add it, or leave them out")


def _sampling(opened: ModelFolder, loaded: LoadedRecipe | None, given: Sampling) -> dict[str, Any]:
    """Return the sampling of a recipe, or else of the model's family; nothing of an unknown family.

    Raises:
        RecipeError: If the model cannot draw the size that results with the given defaults.
    """
    from quantkit.families.registry import detect

    try:
        family = detect(opened)
    except UnsupportedModelError:  # the server runs any pipeline that diffusers knows
        return {}
    sampling = family.sampling_for(*([loaded.recipe.sampling, loaded.recipe.serve] if loaded is not None else []))
    family.check_sizes(
        opened,
        given.over(sampling),
        lambda key: f"--default {key}" if getattr(given, key) is not None else f"the recipe's {key}",
    )
    # Requests call the length of an answer max_tokens, and it has a limit of its own.
    return {name: value for name, value in sampling.given().items() if name != "max_new_tokens"}
