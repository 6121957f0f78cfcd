"""Numbers as people read them."""

from __future__ import annotations

import math


def short(value: float) -> str:
    """Return a number with three to four significant digits, e.g. ``0.0412``, ``31.42``, ``1.23e-05``.

    Just below 1 the digits count from the first that is no 9: ``0.99987``.
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.2e}"
    if 0.9 <= abs(value) < 1:  # what matters of a cosine is how far it is from 1
        decimals = 2 - math.floor(math.log10(1 - abs(value)))
        return f"{value:.{decimals}f}".rstrip("0")
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def size(count: float) -> str:
    """Return bytes in binary units, e.g. ``6.7 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def milliseconds(value: float) -> str:
    """Return a time given in milliseconds, in seconds from 10 s on."""
    if value >= 1e4:
        return f"{value / 1e3:.3g} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    """Return a time given in seconds."""
    return milliseconds(value * 1e3) if value < 1 else f"{value:.3g} s"


def times(ratio: float) -> str:
    """Return a ratio, e.g. ``0.27x``."""
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"
