"""From a folder to a model that runs: quantized or not, the call is the same.

Whether a component is quantized is read from its own ``config.json``. Quantized components are assembled here;
everything else goes through the libraries' own ``from_pretrained``. Weights come from safetensors alone and no
code from a model repository is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit_runtime.architecture import build_transformers, class_of, find_class, is_own, library_errors
from quantkit_runtime.assembly import assemble, check_none_missing
from quantkit_runtime.checkpoint import WeightFiles, read_json
from quantkit_runtime.choice import check_choice, check_cuda_graphs
from quantkit_runtime.compilation import compile_model, compile_pipeline
from quantkit_runtime.config import QuantizationConfig, quantization_of
from quantkit_runtime.download import download
from quantkit_runtime.errors import (
    BackendUnavailableError,
    CheckpointFormatError,
    ParallelError,
    QuantkitRuntimeError,
)
from quantkit_runtime.graphs import record_pipeline
from quantkit_runtime.models.glm_image import split_pictures
from quantkit_runtime.optional import import_optional
from quantkit_runtime.parallel.plans import ENCODERS, has_plan

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Voices of Qwen2.5-Omni's talker, without which it does not even write text.
_SPEAKERS = "spk_dict.pt"
_GENERATION = "generation_config.json"


def load_pipeline(
    path: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute: str = "auto",
    backend: str = "auto",
    compile: bool = False,  # noqa: A002  (as diffusers and transformers call it)
    cuda_graphs: bool = False,
    tensor_parallel: Any = None,
) -> Any:
    """Load a diffusers pipeline whose components may be packed.

    Args:
        path: A local folder with ``model_index.json``, that of a BAGEL, or a hub id.
        device: Where to run, e.g. ``"cpu"`` or ``"cuda:1"``.
        dtype: For all floating weights that are not packed, except those a model class keeps in float32.
        compute: Of packed layers: ``"16bit"``, ``"fp8"`` or ``"auto"``, which is ``"16bit"``.
        backend: Of packed layers: ``"auto"`` or the name of one kernel backend.
        compile: Compile the repeated blocks of the denoisers with their first call, see
            :mod:`quantkit_runtime.compilation`; what is going on is logged as ``quantkit_runtime``.
        cuda_graphs: Record the denoisers' calls, compiled or not, and replay them, see
            :mod:`quantkit_runtime.graphs`.
        tensor_parallel: Ranks that share the weights of the denoiser, and of text encoders that can be, packed or
            not: a process group or a device mesh of one dimension. Every rank loads its part with the same call,
            and runs the pipeline through ``quantkit_runtime.parallel``.

    Returns:
        An ordinary ``diffusers.DiffusionPipeline`` on ``device``.

    Raises:
        ParallelError: The denoiser cannot be shared by so many ranks.
        CheckpointFormatError: The folder is not a pipeline, or its files are damaged, contradictory or unknown.
        BackendUnavailableError: Device, compute mode, backend or CUDA graphs are not available here, or compute
            mode and backend have no packed layer to go to.
        MissingDependencyError: diffusers is not installed.
        QuantkitRuntimeError: ``dtype`` is no dtype, or ``compile`` finds no repeated blocks.
    """
    target = available_device(device)
    _check_dtype(dtype)
    group = _group(tensor_parallel)
    if cuda_graphs:
        check_cuda_graphs(target.type, shares_weights=group is not None)
    folder = local_folder(path)
    index_path = folder / "model_index.json"
    if (folder / "config.json").is_file() and is_own(read_json(folder / "config.json")):
        # The one model of which this package has the pipeline, too.
        make = import_module("quantkit_runtime.models.bagel_pipeline").make_pipeline
        model = load_model(
            folder, device=target, dtype=dtype, compute=compute, backend=backend, tensor_parallel=tensor_parallel
        )
        return _ready(make(folder, model, dtype), target, compile=compile, cuda_graphs=cuda_graphs)
    if not index_path.is_file():
        raise CheckpointFormatError(f"{index_path}: missing; give the root folder of a diffusers pipeline")
    check_choice(folder, compute=compute, backend=backend)
    diffusers = import_optional("diffusers")
    index = read_json(index_path)
    loaded, has_shared_denoiser = {}, False
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2:
            raise CheckpointFormatError(f"{index_path}: {name}: is {entry}, not a library and a class")
        if entry[0] is None:
            continue
        config_path = folder / name / "config.json"
        if not (folder / name).is_dir():
            raise CheckpointFormatError(f"{folder / name}: missing, though {index_path.name} names it; download it")
        if not config_path.is_file():  # a scheduler or tokenizer
            continue
        quantization = quantization_of(read_json(config_path), config_path)
        shared = group is not None and _is_shared(entry, index_path)
        files = _open_unpacked(folder / name) if quantization is None else None
        if files is not None and not shared:
            if entry[0] in ("diffusers", "transformers"):
                loaded[name] = _from_pretrained(files, find_class(entry[0], entry[1], index_path), dtype)
            continue
        model_class = find_class(entry[0], entry[1], index_path)
        load = partial(
            _assemble, folder / name, model_class, quantization, target, dtype, compute=compute, backend=backend
        )
        try:
            loaded[name] = load(group=group if shared else None)
        except ParallelError:
            if entry[0] == "diffusers":
                raise
            loaded[name] = load()  # a text encoder that cannot be divided by so many ranks stays whole
        has_shared_denoiser |= shared and entry[0] == "diffusers"
    if group is not None and not has_shared_denoiser:
        raise ParallelError(f"{folder}: no component has a tensor-parallel plan; run it on one rank")
    # Called on its base class, a pipeline loads its optional components (Wan's transformers) again and drops ours.
    pipeline_class = getattr(diffusers, str(index.get("_class_name")), diffusers.DiffusionPipeline)
    with library_errors(folder):
        pipeline = pipeline_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **loaded
        )
    assert all(getattr(pipeline, name) is model for name, model in loaded.items())
    if type(pipeline).__name__ == "GlmImagePipeline":
        split_pictures(pipeline.vision_language_encoder)
    return _ready(pipeline, target, compile=compile, cuda_graphs=cuda_graphs)


def _ready(pipeline: Any, device: torch.device, *, compile: bool, cuda_graphs: bool) -> Any:  # noqa: A002
    pipeline.to(device)
    if compile:
        compile_pipeline(pipeline)
    if cuda_graphs:
        record_pipeline(pipeline)
    return pipeline


def load_model(
    path: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute: str = "auto",
    backend: str = "auto",
    compile: bool = False,  # noqa: A002  (as above)
    tensor_parallel: Any = None,
) -> nn.Module:
    """Load one model, packed or not: a transformers model, a single diffusers component, or a BAGEL.

    Args:
        path: A local folder with ``config.json``, or a hub id.
        device: Where to run.
        dtype: For all floating weights that are not packed, except those a model class keeps in float32.
        compute: Of packed layers, as above.
        backend: Of packed layers, as above.
        compile: Compile the repeated blocks with their first call, likewise.
        tensor_parallel: Ranks that share the weights, packed or not: a process group or a device mesh of one
            dimension. Every rank must call the model with the same inputs; it gets the same result.

    Returns:
        The model on ``device``, in evaluation mode. Its class is the one that ``config.json`` names.

    Raises:
        CheckpointFormatError: The files are missing, damaged, contradictory or of an unknown kind.
        BackendUnavailableError: Device, compute mode or backend are not available here, or the latter two have no
            packed layer to go to.
        MissingDependencyError: The library of the model's class is not installed.
        QuantkitRuntimeError: ``dtype`` is no dtype, ``compile`` finds no repeated blocks.
        ParallelError: The model cannot be shared by so many ranks.
    """
    target = available_device(device)
    _check_dtype(dtype)
    folder = local_folder(path)
    config_path = folder / "config.json"
    if not config_path.is_file() and (folder / "model_index.json").is_file():
        raise CheckpointFormatError(
            f"{folder}: is a pipeline; load it with load_pipeline, or one component's folder"
        )
    config = read_json(config_path)
    check_choice(folder, compute=compute, backend=backend)
    model_class = class_of(config, config_path)
    quantization = quantization_of(config, config_path)
    if (generation := folder / _GENERATION).is_file():
        read_json(generation)  # damage shows here: transformers would go on without it
    files = _open_unpacked(folder) if quantization is None else None
    group = _group(tensor_parallel)
    model: nn.Module
    if files is None or is_own(config) or group is not None:
        model = _assemble(
            folder, model_class, quantization, target, dtype, compute=compute, backend=backend, group=group
        )
    else:
        model = _from_pretrained(files, model_class, dtype).to(target).eval()
    if compile:
        compile_model(model)
    return model


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise QuantkitRuntimeError(f"dtype {dtype!r}: not a torch.dtype; give one, as torch.bfloat16")


def _open_unpacked(folder: Path) -> WeightFiles:
    """Open weights that no ``quantization_config`` says to be packed; damage shows here, with the file's name."""
    files = WeightFiles(folder)
    if any(name.endswith(".qweight") for name in files.tensors):
        raise CheckpointFormatError(
            f"{folder / 'config.json'}: has no quantization_config, but the weights are packed; "
            "copy the checkpoint again"
        )
    return files


def _from_pretrained(files: WeightFiles, model_class: Any, dtype: torch.dtype) -> nn.Module:
    """Load a model of which nothing is packed through its library, which would go on where a weight is missing."""
    speaks = hasattr(model_class, "load_speakers")  # Qwen2.5-Omni, whose own method cannot return what is missing
    load = super(model_class, model_class).from_pretrained if speaks else model_class.from_pretrained
    model: nn.Module
    with library_errors(files.folder):
        model, report = load(
            # As text, because diffusers keeps it in the configuration, which is written as JSON.
            str(files.folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if speaks:
            model_class.load_speakers(model, files.folder / _SPEAKERS)
    parameters = dict(model.named_parameters())  # a buffer that is missing has been computed
    check_none_missing(files.folder, sorted(parameters.keys() & report["missing_keys"]))
    return model


def _assemble(
    folder: Path,
    model_class: Any,
    quantization: QuantizationConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compute: str,
    backend: str,
    group: Any = None,
) -> nn.Module:
    model = assemble(
        folder,
        _builder(folder, model_class, dtype),
        quantization,
        device=device,
        dtype=dtype,
        compute=compute,
        backend=backend,
        group=group,
    )
    if (folder / _GENERATION).is_file():
        with library_errors(folder / _GENERATION):
            model.generation_config = import_optional("transformers").GenerationConfig.from_pretrained(folder)
    load_speakers: Any = getattr(model, "load_speakers", None)
    if load_speakers is not None and (folder / _SPEAKERS).is_file():
        with library_errors(folder):
            load_speakers(folder / _SPEAKERS)  # transformers admits nothing but tensors in it
    return model


def _group(ranks: Any) -> Any:
    """Return the process group of a group or a mesh; None if there is but one rank in it."""
    group = ranks.get_group() if hasattr(ranks, "get_group") else ranks
    return None if group is None or torch.distributed.get_world_size(group) == 1 else group


def _is_shared(entry: list[Any], path: Path) -> bool:
    if entry[0] == "transformers":
        return entry[1] in ENCODERS
    return entry[0] == "diffusers" and has_plan(find_class(entry[0], entry[1], path))


def _builder(folder: Path, model_class: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    if hasattr(model_class, "from_folder"):  # one of this package
        return lambda: model_class.from_folder(folder)
    if hasattr(model_class, "load_config"):
        return _diffusers_builder(folder, model_class, dtype)
    return _transformers_builder(folder, model_class, dtype)


def _diffusers_builder(folder: Path, model_class: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    del dtype  # diffusers' configurations have none

    def build() -> nn.Module:
        with library_errors(folder):
            config = model_class.load_config(folder)
            # diffusers would hand the model to its own AutoRound loader.
            config.pop("quantization_config", None)
            model: nn.Module = model_class.from_config(config)
            return model

    return build


def _transformers_builder(folder: Path, model_class: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    path = folder / "config.json"
    return lambda: build_transformers(model_class, read_json(path), path, dtype)


def available_device(device: str | torch.device) -> torch.device:
    """Return a device that can hold weights.

    Raises:
        BackendUnavailableError: torch does not know it, or this machine does not have it.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BackendUnavailableError(f"device {device!r}: not a device that this torch knows") from error
    if target.type in ("cpu", "meta"):
        if target.type == "meta":
            raise BackendUnavailableError("device 'meta': weights need a real device")
        return target
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is None or present.type != target.type or (target.index or 0) >= torch.accelerator.device_count():
        has = f"{torch.accelerator.device_count()} of type {present.type}" if present is not None else "none"
        raise BackendUnavailableError(f"device {str(target)!r}: not available here (accelerators: {has})")
    return target


def local_folder(path: str | PathLike[str]) -> Path:
    """Return the folder of a model, downloaded first if it is a hub id.

    Raises:
        CheckpointFormatError: There is no such folder, and the hub does not give it.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise CheckpointFormatError(f"{path}: not a folder; give a local model folder or a hub id like org/name")
    return download(str(path))
