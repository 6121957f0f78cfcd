"""Libraries that only some uses need; they are imported when a use comes up."""

from importlib import import_module
from typing import Any

from quantkit_runtime.errors import MissingDependencyError


def import_optional(name: str) -> Any:
    """Import a package of the ``[diffusers]`` extra.

    Raises:
        MissingDependencyError: It is not installed, or broken.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is needed to load this model ({error}): pip install 'quantkit-runtime[diffusers]'"
        ) from error
