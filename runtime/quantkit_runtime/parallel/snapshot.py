"""What a call was given, kept so that a later call can be compared with it.

Containers are copied, because pipelines change dictionaries between two calls; tensors are kept by reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """An object that is neither tensor nor container nor plain value, with its attributes as they were."""

    owner: Any
    attributes: dict[str, Any]


def snapshot(value: Any) -> Any:
    """Return a copy of all containers in a value, with tensors and plain values as they are."""
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(entry) for entry in value)
    if isinstance(value, Tensor) or callable(value) or not hasattr(value, "__dict__"):
        return value
    return State(value, snapshot(vars(value)))


def thaw(value: Any) -> Any:
    """Return a snapshot as a call takes it."""
    if isinstance(value, dict):
        return {key: thaw(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(thaw(entry) for entry in value)
    return value.owner if isinstance(value, State) else value


def same(value: Any, other: Any) -> bool:
    """Whether two snapshots are equal; tensors are compared by content, which waits for their device."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(same(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, State):
        return value.owner is other.owner and same(value.attributes, other.attributes)
    return bool(value == other)
