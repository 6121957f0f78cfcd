"""Where numbers come from: library versions, device, time."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LIBRARIES = (
    "quantkit", "quantkit-runtime", "torch", "diffusers", "transformers", "safetensors", "numpy", "scikit-image",
    "flip-evaluator", "lpips",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def device_name(device: torch.device) -> str:
    """Return the device with the name of its hardware, e.g. ``cuda (NVIDIA H100)``."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    backend = getattr(torch, device.type, None)
    describe = getattr(backend, "get_device_name", None)
    return f"{device} ({describe(device)})" if describe is not None else str(device)


def created_now() -> str:
    """Return the time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
