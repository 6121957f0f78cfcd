"""LPIPS with backbone weights that are already on this machine; nothing is ever downloaded.

The ``lpips`` wheel ships the small linear heads only. The AlexNet below them comes from a file or from torch
hub's cache.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import RecipeError

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
"""Name under which torchvision keeps its ImageNet AlexNet in torch hub's cache."""

LPIPS_MIN_PIXELS = 31
"""Smallest side of an image that AlexNet's strides leave something of."""


def _cached_backbone() -> Path:
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    return Path(home, "hub", "checkpoints", BACKBONE_FILE).expanduser()


def why_no_lpips(backbone: Path | None) -> str | None:
    """Return why LPIPS cannot be computed here, or None.

    Args:
        backbone: AlexNet weights; None looks in torch hub's cache.
    """
    for package in ("lpips", "torchvision"):
        if find_spec(package) is None:
            return f"{package} is not installed: pip install 'quantkit[eval]'"
    if backbone is None and not (cached := _cached_backbone()).is_file():
        return (
            f"AlexNet weights are not at {cached}; put torchvision's {BACKBONE_FILE} there "
            "or name a file with --lpips-backbone"
        )
    return None


class Lpips:
    """Learned perceptual distance of two images (Zhang et al. 2018; AlexNet, version 0.1), on the CPU.

    Args:
        backbone: AlexNet weights with torchvision's names, ``.safetensors`` or ``.pth`` (read as plain tensors,
            no other object is unpickled); None takes those in torch hub's cache.

    Raises:
        RecipeError: If the file cannot be read or holds no AlexNet.
    """

    def __init__(self, backbone: Path | None) -> None:
        import lpips

        with warnings.catch_warnings():
            # lpips calls torchvision by an argument that torchvision has deprecated.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self._model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        path = backbone or _cached_backbone()
        weights = _read_tensors(path)
        for slice_name, layers in self._model.net.named_children():
            if not slice_name.startswith("slice"):
                continue
            for index, layer in layers.named_children():
                for name, parameter in layer.named_parameters():
                    key = f"features.{index}.{name}"
                    if key not in weights or weights[key].shape != parameter.shape:
                        raise RecipeError(f"{path}: no AlexNet: {key} is missing or has another shape")
                    parameter.data.copy_(weights[key])
        self._model.requires_grad_(False)

    def __call__(self, reference: np.ndarray, candidate: np.ndarray) -> float:
        """Return the distance of two uint8 images (height, width, 3) of at least `LPIPS_MIN_PIXELS` each side."""
        import torch

        left, right = (
            torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            for image in (reference, candidate)
        )
        with torch.inference_mode():
            return float(self._model(left, right))


def _read_tensors(path: Path) -> dict[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, TypeError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as AlexNet weights: {error}") from error
