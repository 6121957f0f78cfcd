"""How much memory this process has used."""

from __future__ import annotations


def peak_memory_bytes() -> int:
    """Return the accelerator's peak since the reset, or the highest resident size of the process so far."""
    import resource

    import torch

    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
