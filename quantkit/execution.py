"""Where and how a model runs: device and dtype by the names that options give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import MissingExtraError, RecipeError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        RecipeError: If it is unknown or not available here.
        MissingExtraError: If torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "eval") from error

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: '{name}' is unknown to torch; use auto, cpu, cuda or xpu") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        here = "cpu only" if accelerator is None else f"cpu and {accelerator.type}"
        raise RecipeError(f"device: '{name}' is not available here ({here})")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of one of the names in `DTYPES`.

    Raises:
        RecipeError: If it is none of them.
    """
    import torch

    if name not in DTYPES:
        raise RecipeError(f"dtype: '{name}' is unknown; use one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
