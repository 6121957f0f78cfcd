"""What a device is made of."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs a device works on at a time at least: what NVIDIA calls its multiprocessors."""
    if device.type == "cpu":  # Triton's interpreter
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64
