"""What one rank holds of a layer that several share, and how it is read out of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_runtime.bitstream import WORD_BITS
from quantkit_runtime.config import Scheme

AWQ = "auto_round:auto_awq"
BY_OUTPUT = ("column", "gathered")
"""Styles of Linears that are cut by output features."""


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer.

    Attributes:
        style: ``column``, ``gathered`` (a column layer of which every rank needs the whole output), ``row`` or
            ``norm`` (over features that are cut), or ``table`` (of an embedding whose columns are heads).
        spans: Start and stop of each piece along the axis that is cut, in features.
        features: Along that axis, of the whole layer.
        scheme: How a packed layer is stored; None of one in 16 bit.
        first: Whether the rank is the first of the group.
    """

    style: str
    spans: tuple[tuple[int, int], ...]
    features: int
    scheme: Scheme | None
    first: bool

    @property
    def width(self) -> int:
        """Features of the rank along the axis that is cut."""
        return sum(stop - start for start, stop in self.spans)

    def take(self, suffix: str, stored: Any) -> Tensor:
        """Read the rank's part of one tensor.

        Args:
            suffix: Its name in the layer: ``weight``, ``bias``, ``qweight`` ...
            stored: A slice of ``safetensors``, or a tensor.
        """
        shape = tuple(stored.shape) if isinstance(stored, Tensor) else tuple(stored.get_shape())
        whole: Tensor
        if self.style == "row" and suffix == "bias":
            whole = stored[:]
            return whole if self.first else torch.zeros_like(whole)
        if self.style == "row" and suffix in ("qzeros", "scales") and self._is_one_group:
            whole = stored[:]
            return whole
        axis, numerator, denominator = self._axis(suffix)
        pieces = [
            stored[
                tuple(
                    slice(start * numerator // denominator, stop * numerator // denominator)
                    if dimension == axis
                    else slice(None)
                    for dimension in range(len(shape))
                )
            ]
            for start, stop in self.spans
        ]
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
        return part.contiguous()

    @property
    def _is_one_group(self) -> bool:
        return self.scheme is not None and self.scheme.group_size == -1

    def _axis(self, suffix: str) -> tuple[int, int, int]:
        """Return the axis that is cut, and the ratio of its entries to features."""
        column = self.style in BY_OUTPUT
        if self.scheme is None or suffix not in ("qweight", "qzeros", "scales"):
            return (1 if self.style in ("row", "table") else 0), 1, 1
        words = (self.scheme.bits, WORD_BITS)
        if column:
            packed = suffix == "qzeros" or (suffix == "qweight" and self.scheme.packing_format == AWQ)
            return (1, *(words if packed else (1, 1)))
        if suffix == "qweight":
            return (0, *((1, 1) if self.scheme.packing_format == AWQ else words))
        return 0, 1, self.scheme.group_length(self.features)
