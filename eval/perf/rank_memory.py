"""Bytes of weights that every rank holds, of published models, in BF16 and in 4 bit.

Builds the published architectures without weights and cuts them as loading does::

    python eval/perf/rank_memory.py

The other weights are those of text encoders and VAE, in BF16; an omni model has none. Activations come on top.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from quantkit_runtime.architecture import build_transformers, class_of
from quantkit_runtime.checkpoint import read_json
from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import ParallelError
from quantkit_runtime.format import packed_tensors
from quantkit_runtime.parallel.call import DENOISERS
from quantkit_runtime.parallel.cuts import SchemeOf
from quantkit_runtime.parallel.plans import ENCODERS
from quantkit_runtime.parallel.tensor import shard

PUBLISHED = Path(__file__).resolve().parents[2] / "quantkit" / "families" / "published"
MODELS = {  # with the number of denoisers, or of language models
    "black-forest-labs/FLUX.1-dev": 1,
    "AIDC-AI/Ovis-Image-7B": 1,
    "zai-org/GLM-Image": 1,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 1,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2,
    "Qwen/Qwen2.5-Omni-7B": 1,
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": 1,
}
BLOCKS = (
    "blocks.", "transformer_blocks.", "single_transformer_blocks.",
    "thinker.model.layers.", "thinker.model.language_model.layers.",
)  # fmt: skip
RANKS = (1, 2, 4)
SCHEME = Scheme()


def weight_bytes(model: str, ranks: int, *, packed: bool) -> int:
    """Return the bytes of one denoiser, or language model, that the first of some ranks holds.

    Args:
        model: Of `MODELS`.
        ranks: That share it.
        packed: Whether Linears and experts of its blocks are; routers never are.

    Raises:
        ParallelError: So many ranks cannot share it.
    """
    path = PUBLISHED / model / "transformer" / "config.json"
    path = path if path.is_file() else PUBLISHED / model / "config.json"

    def scheme_of(name: str) -> Scheme | None:
        return SCHEME if packed and name.startswith(BLOCKS) and not name.endswith(".mlp.gate") else None

    built = build(path)
    if ranks > 1:
        cut(built, ranks, scheme_of)
    nbytes = 0
    for name, parameter in built.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = built.get_submodule(owner)
        is_linear = attribute == "weight" and isinstance(module, nn.Linear)
        is_experts = attribute in ("gate_up_proj", "down_proj")
        if (is_linear or is_experts) and scheme_of(owner) is not None:
            *experts, rows, columns = parameter.shape
            stored = packed_tensors(columns, rows, SCHEME).values()
            nbytes += math.prod(experts) * sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
        else:
            nbytes += 2 * parameter.numel()
    return nbytes


def other_bytes(model: str, ranks: int) -> int:
    """Return the bytes of all components but the denoisers, in BF16; text encoders that can be are shared."""
    nbytes = 0
    for path in sorted((PUBLISHED / model).glob("*/config.json")):
        if path.parent.name in DENOISERS:
            continue
        built = build(path)
        if ranks > 1 and type(built).__name__ in ENCODERS:
            with contextlib.suppress(ParallelError):  # it stays whole
                cut(built, ranks, lambda _name: None)
        nbytes += 2 * sum(parameter.numel() for parameter in built.parameters())
    return nbytes


def build(path: Path) -> nn.Module:
    """Make the architecture of a ``config.json``, on the meta device."""
    config = read_json(path)
    with torch.device("meta"):
        if "_class_name" in config:
            model: nn.Module = class_of(config, path).from_config(config)
            return model
        return build_transformers(class_of(config, path), config, path, torch.bfloat16)


def cut(model: nn.Module, ranks: int, scheme_of: SchemeOf) -> None:
    """Make the layers of a model as small as the first rank's share."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        shard(model, dist.group.WORLD, scheme_of)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    kinds = [f"{kind} TP={n}" for kind in ("BF16", "W4", "other") for n in RANKS]
    print(f"{'GB of weights per rank':36}" + "".join(f"{kind:>11}" for kind in kinds))
    for model, count in MODELS.items():
        sizes = []
        for packed in (False, True):
            for ranks in RANKS:
                try:
                    sizes.append(count * weight_bytes(model, ranks, packed=packed))
                except ParallelError:
                    sizes.append(math.nan)
        sizes += [other_bytes(model, ranks) for ranks in RANKS]
        print(f"{model:36}" + "".join(f"{size / 1e9:11.2f}" for size in sizes))


if __name__ == "__main__":
    main()
