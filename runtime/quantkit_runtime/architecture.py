"""The class of a model, and the model without weights, from what its ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit_runtime.config import without_quantization
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.optional import import_optional

# Models that only this package has a class for: model_type -> where.
_OWN_CLASSES = {"bagel": ("quantkit_runtime.models.bagel", "Bagel")}


def class_of(config: Mapping[str, Any], path: Path) -> Any:
    """Return the class of a single model or component.

    Some published models name an architecture that transformers never had (Qwen2.5-Omni says ``Qwen2_5OmniModel``);
    then it is the class that generates for their ``model_type``.

    Args:
        config: Content of its ``config.json``.
        path: The file, for messages.

    Raises:
        CheckpointFormatError: It names no class of the installed libraries.
        MissingDependencyError: The library is not installed.
    """
    if is_own(config):
        module, name = _OWN_CLASSES[config["model_type"]]
        return getattr(import_module(module), name)
    if "_class_name" in config:
        return find_class("diffusers", config["_class_name"], path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointFormatError(f"{path}: architectures: missing; it must name the model's class")
    name = architectures[0]
    if not hasattr(import_optional("transformers"), str(name)):
        known = import_optional("transformers.models.auto.modeling_auto").MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        name = known.get(config.get("model_type"), name)
    return find_class("transformers", name, path)


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether the class of a ``config.json`` is one of this package, with a method ``from_folder``."""
    return config.get("model_type") in _OWN_CLASSES


def find_class(library: str, name: str, path: Path) -> Any:
    """Return a class of diffusers or transformers by name.

    Raises:
        CheckpointFormatError: The library is another, or has no such class; the message names ``path``.
        MissingDependencyError: The library is not installed.
    """
    if library not in ("diffusers", "transformers"):
        raise CheckpointFormatError(
            f"{path}: {name}: its library {library!r} is not supported; only diffusers and transformers are"
        )
    found = getattr(import_optional(library), name, None)
    if found is None:
        raise CheckpointFormatError(
            f"{path}: {name}: unknown to the installed {library}; upgrade {library} (code from model "
            "repositories is not run)"
        )
    return found


def build_transformers(model_class: Any, config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> nn.Module:
    """Build a transformers model that is not quantized, on whatever device is the default.

    Args:
        model_class: From `class_of`.
        config: Content of its ``config.json``; a ``quantization_config`` is left out.
        path: The file, for messages.
        dtype: What the configuration says of the weights' dtype.

    Raises:
        CheckpointFormatError: The configuration does not describe the class.
    """
    with library_errors(path.parent):
        parsed = model_class.config_class.from_dict(without_quantization(config))
        parsed.dtype = dtype
        model: nn.Module = model_class(parsed)
        return model


@contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """Turn what diffusers and transformers raise on bad folders into one line that names the folder."""
    try:
        yield
    except (torch.OutOfMemoryError, CheckpointFormatError):
        raise
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointFormatError(f"{folder}: cannot be loaded: {reason}") from error
