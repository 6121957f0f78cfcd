"""The ways to run guided steps that cfg_parallel.py measures, and what is the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to run the same steps.

    Attributes:
        name: For the table.
        packed: W4A16 instead of BF16 weights.
        cfg: Branches at the same time.
        tensor: Ranks that share the weights of one branch.
    """

    name: str
    packed: bool
    cfg: int
    tensor: int

    @property
    def ranks(self) -> int:
        """Ranks that take part."""
        return self.cfg * self.tensor


@dataclass(frozen=True)
class Settings:
    """What is the same for all variants."""

    model: str
    device: str
    steps: int
    rounds: int
    size: int
    compute: str
    backend: str
    compile: bool
    layers: int | None


def variants(ranks: int) -> list[Variant]:
    """Return what is measured on this many ranks; the first is what the others are held against."""
    half = ranks // 2
    return [
        Variant("BF16, one rank", False, 1, 1),
        Variant("BF16, CFG = 2", False, 2, 1),
        Variant(f"BF16, TP = {ranks}, sequential", False, 1, ranks),
        Variant(f"W4A16, TP = {half}, CFG = 2" if half > 1 else "W4A16, CFG = 2", True, 2, half),
    ]
