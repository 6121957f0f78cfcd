"""Writing a checkpoint: packed layers as planned, every other tensor and file exactly as in the source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component, ModelFolder, walk_files
from quantkit.quantize.plan import ComponentPlan, PlannedLayer
from quantkit.quantize.progress import OnProgress, Progress
from quantkit.quantize.rtn import Pack
from quantkit.quantize.tensors import TensorFile, open_threads, read_blocks, torch_dtype
from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    import torch

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
)
_REPLACED = {"README.md", "quantkit.json"}
# Names by which libraries look for a model's weights; in a quantized component, files called so are replaced.
_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")


def is_weight_file(path: Path) -> bool:
    """Whether a file holds weights or their index."""
    return path.name.endswith(_WEIGHT_SUFFIXES)


def is_replaced(component: Component, path: Path) -> bool:
    """Whether the export of a quantized component writes a file of it anew, or leaves it out for what it writes.

    Those are ``config.json`` and the component's weights in whatever form. Other files stay, weights too: a single
    model may keep a second network or its speakers beside its own.
    """
    if path.parent != component.folder:
        return False
    if path.name == "config.json":
        return True
    return is_weight_file(path) and path.name.startswith((*_STEMS, _stem(component)))


def _stem(component: Component) -> str:
    """Return what a component's weight files are called, without shard number and suffix.

    An index may join files of several names. Those with most of the bytes are the component's own; the others hold
    another network, such as BAGEL's VAE, and the export leaves them as they are.
    """
    sizes: dict[str, int] = {}
    for info in component.tensors.values():
        stem = _stem_of(info.file)
        sizes[stem] = sizes.get(stem, 0) + info.nbytes
    return max(sizes, key=lambda stem: sizes[stem], default=_STEMS[0])


def _stem_of(path: Path) -> str:
    return path.name.removesuffix(".safetensors").partition("-")[0]


def place_untouched(source: ModelFolder, quantized: Sequence[str], target: Path) -> None:
    """Put everything of the source that is not quantized into the checkpoint.

    Weights are hard-linked where the file system can, small files copied: people edit those in place.

    Left out are the model card and the manifest, which the export writes anew, and weights in a pipeline's root
    folder: they belong to no component (FLUX.1-dev keeps its single-file original there).

    Args:
        source: The 16-bit model.
        quantized: Names of the components whose weights and ``config.json`` the export writes itself.
        target: The checkpoint being built.
    """
    for path in source.other_files:
        if path.name not in _REPLACED and not is_weight_file(path):
            _place(path, target / path.relative_to(source.folder))
    for component in source.components.values():
        for path in walk_files(component.folder):
            if component.name in quantized and is_replaced(component, path):
                continue
            if path.parent == source.folder and path.name in _REPLACED:
                continue
            _place(path, target / path.relative_to(source.folder))


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    resolved = source.resolve()  # a hub cache holds symbolic links to its blobs
    if is_weight_file(source):
        try:
            os.link(resolved, target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    shutil.copyfile(resolved, target)


def write_component(
    part: ComponentPlan,
    pack: Pack,
    config: dict[str, Any],
    target: Path,
    *,
    max_shard_bytes: int,
    on_progress: OnProgress,
) -> None:
    """Write the weights and ``config.json`` of a quantized component.

    Args:
        part: What to write.
        pack: Gives the packed tensors of a planned layer.
        config: The ``config.json``.
        target: The component's folder in the checkpoint being built.
        max_shard_bytes: A new file is begun when the next tensors would pass this size.
        on_progress: Told after each layer.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity.
        OSError: If a file cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    source_stem = _stem(part.component)
    stem = _STEMS[0] if part.component.library == "diffusers" else source_stem
    weight_map = {
        name: info.file.name for name, info in part.component.tensors.items() if _stem_of(info.file) != source_stem
    }
    shards = _assign_shards(part, max_shard_bytes, kept=weight_map.keys())
    done = 0
    for number, entries in enumerate(shards, start=1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = _layout(entries)
        weight_map |= dict.fromkeys(layout, name)
        with TensorFile(target / name, layout) as file, open_threads() as threads:
            for entry in threads.map(partial(_write_entry, file, pack), entries):
                if isinstance(entry, PlannedLayer):
                    done += 1
                    on_progress(Progress("write", done, len(part.layers), entry.name))
    if len(set(weight_map.values())) > 1:
        total = part.nbytes_after
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        index_stem = stem if stem in _STEMS else "model"
        write_json(target / f"{index_stem}.safetensors.index.json", index)
    write_json(target / "config.json", config)


def _assign_shards(
    part: ComponentPlan, max_shard_bytes: int, kept: Collection[str]
) -> list[list[PlannedLayer | TensorInfo]]:
    """Split what a component holds, in the source's order, into files of at most the given size.

    Args:
        part: The component.
        max_shard_bytes: The size.
        kept: Tensors that stay in files of the source.
    """
    layers = {f"{layer.name}.weight": layer for layer in part.layers}
    shards: list[list[PlannedLayer | TensorInfo]] = [[]]
    size = 0
    for name, info in part.component.tensors.items():
        if name in kept:
            continue
        entry = layers.get(name, info)
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _layout(entries: Sequence[PlannedLayer | TensorInfo]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor that a file is to hold."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for entry in entries:
        if isinstance(entry, PlannedLayer):
            layout |= entry.tensors
        else:
            layout[entry.name] = entry.shape, torch_dtype(entry.dtype)
    return layout


def _write_entry(file: TensorFile, pack: Pack, entry: PlannedLayer | TensorInfo) -> PlannedLayer | TensorInfo:
    if isinstance(entry, PlannedLayer):
        for name, tensor in pack(entry).items():
            file.write(name, [tensor])
    else:
        file.write(entry.name, read_blocks(entry))
    return entry


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file as people like to read it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
