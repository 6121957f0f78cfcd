"""Bytes of weights that every rank holds, of published models, in BF16 and in 4 bit.

Builds the published architectures without weights and cuts them as loading does::

    python eval/perf/rank_memory.py

The last column is what is on every rank whole, in BF16: text encoders and VAE. Activations come on top.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from quantkit_runtime.architecture import build_transformers, class_of
from quantkit_runtime.checkpoint import read_json
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import packed_tensors
from quantkit_runtime.parallel.call import DENOISERS
from quantkit_runtime.parallel.tensor import shard

PUBLISHED = Path(__file__).resolve().parents[2] / "quantkit" / "families" / "published"
MODELS = {  # with the number of denoisers
    "black-forest-labs/FLUX.1-dev": 1,
    "AIDC-AI/Ovis-Image-7B": 1,
    "zai-org/GLM-Image": 1,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 1,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2,
}
RANKS = (1, 2, 4)
SCHEME = Scheme()


def weight_bytes(model: str, ranks: int, *, packed: bool) -> int:
    """Return the bytes of one denoiser that the first of some ranks holds; Linears of its blocks may be packed."""
    import diffusers
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def scheme_of(name: str) -> Scheme | None:
        return SCHEME if packed and "blocks." in name else None

    config = json.loads((PUBLISHED / model / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        built = getattr(diffusers, config["_class_name"]).from_config(config)
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        shard(built, dist.group.WORLD, scheme_of)
        dist.destroy_process_group()
    nbytes = 0
    for name, parameter in built.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = built.get_submodule(owner)
        if attribute == "weight" and isinstance(module, nn.Linear) and scheme_of(owner) is not None:
            stored = packed_tensors(module.in_features, module.out_features, SCHEME).values()
            nbytes += sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in stored)
        else:
            nbytes += 2 * parameter.numel()
    return nbytes


def whole_bytes(model: str) -> int:
    """Return the bytes of all components but the denoisers, in BF16."""
    folder = PUBLISHED / model
    nbytes = 0
    for path in sorted(folder.glob("*/config.json")):
        if path.parent.name in DENOISERS:
            continue
        config = read_json(path)
        with torch.device("meta"):
            if "_class_name" in config:
                built = class_of(config, path).from_config(config)
            else:
                built = build_transformers(class_of(config, path), config, path, torch.bfloat16)
        nbytes += 2 * sum(parameter.numel() for parameter in built.parameters())
    return nbytes


def main() -> None:
    """Print the table."""
    print(
        f"{'GB of weights per rank':36}"
        + "".join(f"{f'{kind} TP={n}':>11}" for kind in ("BF16", "W4") for n in RANKS)
        + f"{'whole':>8}"
    )
    for model, count in MODELS.items():
        sizes = [
            count * weight_bytes(model, ranks, packed=packed) / 1e9 for packed in (False, True) for ranks in RANKS
        ]
        print(f"{model:36}" + "".join(f"{size:11.2f}" for size in sizes) + f"{whole_bytes(model) / 1e9:8.2f}")


if __name__ == "__main__":
    main()
