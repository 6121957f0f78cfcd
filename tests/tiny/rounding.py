"""Packed checkpoints without quantkit, of which a machine may have the runtime alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def round_component(source: Path, target: Path, blocks: tuple[str, ...], *, bits: int = 4, group_size: int) -> Path:
    """Copy a folder of one model, the Linears of some blocks rounded to nearest and packed; return its folder."""
    from safetensors.torch import load_file, save_file

    from quantkit_runtime.config import Scheme
    from quantkit_runtime.format import pack
    from quantkit_runtime.rounding import quantize_rtn

    scheme = Scheme(bits=bits, group_size=group_size, sym=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile)  # files of an installed package may be read-only
    [file] = target.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(source / file.name).items():
        layer = name.removesuffix(".weight")
        if layer.startswith(tuple(f"{block}." for block in blocks)) and tensor.ndim == 2:
            packed = pack(*quantize_rtn(tensor, scheme), scheme)
            tensors |= {f"{layer}.{key}": value for key, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": ",".join(blocks),
    }
    (target / "config.json").write_text(json.dumps(config))
    return target
