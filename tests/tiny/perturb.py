"""Candidates that are off by a known strength."""

import shutil

import torch
from safetensors.torch import load_file, save_file


def perturb(source, target, strength, pattern="transformer/*.safetensors"):
    """Copy a model with noise on the matrices of the files that match, relative to their spread."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(target.glob(pattern)):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                tensors[name] = (tensor.float() + strength * noise).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return target
