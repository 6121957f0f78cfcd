"""Which devices tuning runs on, as the user names them."""

from __future__ import annotations

import re

from quantkit.errors import RecipeError


def resolve_devices(text: str) -> tuple[str, ...]:
    """Return the devices that a text such as ``auto``, ``cpu``, ``cuda:1`` or ``cuda:0,cuda:1`` names.

    ``auto`` is the first accelerator, or the CPU where there is none.

    Raises:
        RecipeError: If one of them is not here, or is no device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    count = 0 if accelerator is None else torch.accelerator.device_count()
    if text == "auto":
        return ("cpu",) if accelerator is None else (f"{kind}:0",)
    here = ["cpu", *(f"{kind}:{index}" for index in range(count))]
    devices = []
    for name in text.replace(" ", "").split(","):
        if not re.fullmatch(r"[a-z]+(:\d+)?", name):
            raise RecipeError(f"--device: {name or text!r} is no device; this machine has {', '.join(here)}")
        full = name if name == "cpu" or ":" in name else f"{name}:0"
        if full not in here:
            raise RecipeError(f"--device: {name} is not here; this machine has {', '.join(here)}")
        devices.append(full)
    if len(set(devices)) < len(devices) or (len(devices) > 1 and "cpu" in devices):
        raise RecipeError(f"--device: {text}: name each accelerator once, or cpu alone")
    return tuple(devices)
