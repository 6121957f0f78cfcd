"""FLUX's autoencoder as its authors publish it (``ae.safetensors``), as a model of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit_runtime.architecture import library_errors
from quantkit_runtime.checkpoint import read_header
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.optional import import_optional

_SCALING_FACTOR, _SHIFT_FACTOR = 0.3611, 0.1159  # black-forest-labs/flux, src/flux/util.py; the file lacks them


def read_flux_vae(path: Path, dtype: torch.dtype) -> Any:
    """Return the ``AutoencoderKL`` of a file, on the CPU in evaluation mode; its sizes are those of the tensors.

    Raises:
        CheckpointFormatError: The file is missing or damaged, or holds another model.
        MissingDependencyError: diffusers is not installed.
    """
    read_header(path)  # damage shows here, with the file's name
    diffusers = import_optional("diffusers")
    convert = import_optional("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    with library_errors(path.parent):
        tensors = load_file(path)
        config = _config(tensors, path)
        vae = diffusers.AutoencoderKL.from_config(config)
        weights = {name: tensor.to(dtype) for name, tensor in convert(tensors, config).items()}
        problem = vae.load_state_dict(weights, strict=False, assign=True)
        if wrong := [*problem.missing_keys, *problem.unexpected_keys]:
            raise CheckpointFormatError(f"{path}: is no autoencoder of FLUX ({wrong[0]}); download it again")
    return vae.eval().requires_grad_(False)


def _config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    widths: dict[int, int] = {}
    blocks = set()
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name):
            level, block = map(int, found.groups())
            widths[level] = tensor.shape[0]
            blocks.add(block)
    if not widths or "decoder.conv_in.weight" not in tensors:
        raise CheckpointFormatError(f"{path}: is no autoencoder of FLUX; download it again")
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": [widths[level] for level in sorted(widths)],
        "layers_per_block": len(blocks),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "scaling_factor": _SCALING_FACTOR,
        "shift_factor": _SHIFT_FACTOR,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
