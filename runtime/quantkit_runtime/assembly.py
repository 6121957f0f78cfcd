"""One packed model from its files: build on the meta device, swap the packed layers, fill in the tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit_runtime.architecture import library_errors
from quantkit_runtime.checkpoint import WeightFiles
from quantkit_runtime.config import QuantizationConfig
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.names import CheckpointNames
from quantkit_runtime.optional import import_optional
from quantkit_runtime.packed import PackedLayer
from quantkit_runtime.parallel.share import Share
from quantkit_runtime.parallel.tensor import add_sums, shard
from quantkit_runtime.swap import packed_layers, swap_packed


def assemble(
    folder: Path,
    build: Callable[[], nn.Module],
    quantization: QuantizationConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compute: str,
    backend: str,
    group: Any = None,
) -> nn.Module:
    """Load a model in evaluation mode, without gradients.

    The checkpoint's tensors decide which layers are packed and the configuration must agree; afterwards every
    tensor of the checkpoint has been used and every parameter and buffer of the model has a value.

    Args:
        folder: Holds ``config.json`` and the weights.
        build: Makes the unquantized architecture; called where parameters land on the meta device.
        quantization: The folder's parsed ``quantization_config``; None if no layer is packed.
        device: Where the tensors go.
        dtype: For floating tensors of layers that are not packed, except those the model class keeps in float32.
        compute: See :meth:`W4A16Linear.prepare`.
        backend: See :meth:`W4A16Linear.prepare`.
        group: Process group whose ranks share the weights; None if this rank holds all.

    Raises:
        CheckpointFormatError: Files, configuration and architecture disagree.
        ParallelError: A layer cannot be shared by so many ranks.
        BackendUnavailableError: The backend cannot serve a layer.
        MissingDependencyError: accelerate is not installed.
    """
    files = WeightFiles(folder)
    with _empty_parameters(), _default_dtype(dtype):
        model = build()
    _compute_buffers(model)
    names = CheckpointNames(model)
    takes: dict[str, Callable[[Any], Tensor]] = {}
    shares: Mapping[str, Share] = {}
    if group is not None:
        schemes = {} if quantization is None else packed_layers(files, quantization)
        shares = shard(model, group, {names.module(layer): scheme for layer, scheme in schemes.items()}.get)
        takes = _takes(files, names, shares)
    targets = {} if quantization is None else swap_packed(model, files, names, quantization, device)
    _fill(model, files, names, targets, takes, device, dtype)
    if group is not None:
        add_sums(model, shares, group)
    model.to(device)  # non-persistent buffers were computed on the CPU
    model.eval().requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    _side_by_side(lambda layer: layer.prepare(dtype, compute=compute, backend=backend), layers, device)
    return model


_WORKERS = 4  # each holds one unpacked layer
_EXPERT = re.compile(r"\.\d+\.(?=\w+$)")
"""The number of an expert in front of the name of its projection."""


@dataclass(frozen=True)
class _Loaded:
    """A tensor on its way into the model: its name there, and where it comes from."""

    name: str
    tensor: Tensor
    source: str


def _takes(
    files: WeightFiles, names: CheckpointNames, shares: Mapping[str, Share]
) -> dict[str, Callable[[Any], Tensor]]:
    """Return what reads this rank's part of a tensor, for every tensor of the checkpoint that is cut."""
    takes: dict[str, Callable[[Any], Tensor]] = {}
    for tensor in files.tensors:
        layer, _, suffix = tensor.rpartition(".")
        home = names.module(layer)
        share = shares.get(home) or shares.get(_EXPERT.sub(".", home))
        if share is not None:
            takes[tensor] = partial(share.take, suffix)
    return takes


def _read(
    files: WeightFiles,
    names: CheckpointNames,
    targets: Mapping[str, str],
    device: torch.device,
    takes: Mapping[str, Callable[[Any], Tensor]],
) -> Iterator[_Loaded]:
    """Yield every tensor of the checkpoint as the model takes it: renamed, and what it fuses, fused."""
    places = {name: names.place(name) for name in files.tensors if name not in targets}
    missing = Counter(place.name for place in places.values() if place.pattern is not None)
    parts: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for source, tensor in files.read(device, takes):
        where = f"{files.where(source)}: {source}"
        if source in targets:
            yield _Loaded(targets[source], tensor, where)
            continue
        place = places[source]
        if place.pattern is None:
            yield _Loaded(place.name, tensor, where)
            continue
        parts[place.name][source] = (place.pattern, tensor)
        missing[place.name] -= 1
        if not missing[place.name]:
            with library_errors(files.folder):
                fused = names.fuse(place.name, parts.pop(place.name))
            for name, whole in fused.items():
                yield _Loaded(name, whole, where)


def _fill(
    model: nn.Module,
    files: WeightFiles,
    names: CheckpointNames,
    targets: Mapping[str, str],
    takes: Mapping[str, Callable[[Any], Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    expected = model.state_dict()
    packed = set(targets.values())
    ignored = _compile_any(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    computed = {name for name, _ in model.named_buffers()}.difference(expected)
    dtypes = _floating_dtypes(model, dtype)
    state: dict[str, Tensor] = {}
    for loaded in _read(files, names, targets, device, takes):
        name, tensor = loaded.name, loaded.tensor
        if name not in expected:
            # Older versions of a library stored what newer ones compute, such as Qwen2.5-Omni's inv_freq.
            if name in computed or (ignored is not None and ignored.search(name)):
                continue
            raise CheckpointFormatError(
                f"{loaded.source}: has no place in {type(model).__name__}; the checkpoint belongs to another "
                "architecture or library version"
            )
        slot = expected[name]
        if tensor.shape != slot.shape:
            raise CheckpointFormatError(
                f"{loaded.source}: has shape {tuple(tensor.shape)} where {type(model).__name__} needs "
                f"{tuple(slot.shape)}; check config.json or quantize the model again"
            )
        if name in packed and tensor.dtype != slot.dtype:
            raise CheckpointFormatError(
                f"{loaded.source}: has dtype {tensor.dtype} where {slot.dtype} is needed; quantize the model again"
            )
        if name in packed and slot.device.type != "meta":  # its place in a stack of experts
            slot.copy_(tensor)
            packed.remove(name)
            continue
        if name in dtypes and tensor.is_floating_point():
            tensor = tensor.to(dtypes[name])
        state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    tie_weights = getattr(model, "tie_weights", None)  # transformers
    if tie_weights is not None:
        tie_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
    missing += sorted(packed - state.keys() - set(missing))
    check_none_missing(files.folder, missing)


def check_none_missing(folder: Path, missing: Sequence[str]) -> None:
    """Check that the weights of a folder hold all that its model needs.

    Args:
        folder: Holds the weights.
        missing: Names of the tensors that they lack.

    Raises:
        CheckpointFormatError: There are any.
    """
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointFormatError(
            f"{folder}: {missing[0]}{more}: missing from the weights; download or quantize the model again"
        )


def _compute_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds once more, as transformers does.

    A constructor computes them while bf16 is the default dtype, which may round them.
    """
    initialize: Any = getattr(model, "initialize_weights", None)
    if initialize is None:  # diffusers
        return
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # the mark of what transformers must not touch
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    with torch.no_grad():
        initialize()


def _floating_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor is loaded in, for those that do not stay as they are stored.

    That is the given one, but float32 for what the model's class keeps so; a transformers model may also say so
    by making a part of it in another dtype.
    """
    as_stored = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLayer))
    in_float32 = _float32_names(model, dtype)
    own = hasattr(model, "_keep_in_fp32_modules_strict")
    dtypes = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(as_stored):
            continue
        if in_float32 is not None and in_float32.search(name):
            dtypes[name] = torch.float32
        elif tensor.is_floating_point():
            dtypes[name] = tensor.dtype if own else dtype
    return dtypes


def _float32_names(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names that the model's class keeps in float32; see ``_keep_in_fp32_modules`` in both libraries."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if hasattr(model, "_keep_in_fp32_modules_strict"):  # transformers: the plain list guards float16 only
        if dtype != torch.float16:
            names.clear()
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return _compile_any(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in sorted(names))


def _side_by_side(prepare: Callable[[PackedLayer], None], layers: list[PackedLayer], device: torch.device) -> None:
    """Prepare layers, several at a time on the CPU.

    Unpacking is a chain of short operations. Spread over all cores, each ends in a barrier, where a core that does
    something else holds up the others: ten times slower was seen on a busy machine, and no faster on an idle one.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS) if device.type == "cpu" else 1
    if workers == 1:
        for layer in layers:
            prepare(layer)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            for _ in pool.map(prepare, layers):
                pass
    finally:
        torch.set_num_threads(threads)  # a thread sets it for itself and for all that come


def _compile_any(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    return re.compile(joined) if joined else None


def _empty_parameters() -> Any:
    """Context in which new parameters land on the meta device and buffers are really computed."""
    return import_optional("accelerate").init_empty_weights(include_buffers=False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Both libraries build a model under its dtype; buffers computed in the constructor depend on it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
