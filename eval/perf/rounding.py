"""Packed copies of models, rounded to nearest without quantkit, of which a machine may have the runtime alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def round_component(
    source: Path, target: Path, blocks: tuple[str, ...], *, bits: int = 4, group_size: int = 128
) -> Path:
    """Copy the folder of one model, the Linears of some blocks rounded to nearest and packed; return the copy."""
    from safetensors.torch import load_file, save_file

    from quantkit_runtime.config import Scheme
    from quantkit_runtime.format import pack
    from quantkit_runtime.rounding import quantize_rtn

    scheme = Scheme(bits=bits, group_size=group_size)
    shutil.copytree(source, target, copy_function=shutil.copyfile)  # the source's files may be read-only
    [file] = target.glob("*.safetensors")
    tensors = load_file(source / file.name)
    for name in [name for name in tensors if name.startswith(tuple(f"{block}." for block in blocks))]:
        if name.endswith(".weight") and tensors[name].ndim == 2:
            packed = pack(*quantize_rtn(tensors.pop(name), scheme), scheme)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = {
        "quant_method": "auto-round", "bits": bits, "group_size": group_size, "sym": True, "data_type": "int",
        "packing_format": scheme.packing_format, "block_name_to_quantize": ",".join(blocks),
    }  # fmt: skip
    config = target / "config.json"
    described = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": quantization}
    config.write_text(json.dumps(described), encoding="utf-8")
    return target
