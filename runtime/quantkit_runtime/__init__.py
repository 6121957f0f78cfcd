"""Load and run W4A16 checkpoints written by AutoRound, without AutoRound.

Names are resolved on first use, so importing this package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit_runtime.experts import W4A16Experts
    from quantkit_runtime.linear import W4A16Linear
    from quantkit_runtime.load import load_model, load_pipeline

__all__ = ["W4A16Experts", "W4A16Linear", "__version__", "load_model", "load_pipeline"]

__version__ = "0.1.0"

_HOME = {
    "W4A16Experts": "quantkit_runtime.experts",
    "W4A16Linear": "quantkit_runtime.linear",
    "load_model": "quantkit_runtime.load",
    "load_pipeline": "quantkit_runtime.load",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
