"""A line chart as a stand-alone SVG file: text stays text, colours follow the reader's theme."""

from __future__ import annotations

import math
from html import escape

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 190, 44, 52
_LABEL_STEP = 17
_COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#475569")
_STYLE = """
svg{font:13px system-ui,sans-serif;background:#fff;color:#1f2933}
text{fill:currentColor}.heading{font-size:15px;font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:currentColor;stroke-opacity:.15}.line{fill:none;stroke-width:2}.lead{fill:none;stroke-opacity:.4}
@media(prefers-color-scheme:dark){svg{background:#15191e;color:#d9e0e7}}
"""


def line_chart(
    title: str, x_label: str, y_label: str, positions: list[str], series: dict[str, dict[str, float]]
) -> str:
    """Draw values over named positions, the values on a logarithmic axis.

    Args:
        title: Heading.
        x_label: Below the positions.
        y_label: Unit of the values.
        positions: From left to right, evenly spaced.
        series: Values above 0 by position, by name of the line; a line may lack positions.

    Returns:
        The text of an SVG file.
    """
    values = [value for line in series.values() for value in line.values()]
    low, high = _nice(min(values), down=True), _nice(max(values), down=False)
    high = high if high > low else 10 * low
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(position: str) -> float:
        share = (positions.index(position) + 0.5) / len(positions)
        return _LEFT + plot_width * share

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - plot_height * math.log(value / low) / math.log(high / low)

    right = _LEFT + plot_width
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="heading" x="{_LEFT}" y="22">{escape(title)}</text>',
        f'<text class="end" x="{_LEFT - 8}" y="{_TOP - 12}">{escape(y_label)}</text>',
        f'<text class="middle" x="{_LEFT + plot_width / 2}" y="{_HEIGHT - 8}">{escape(x_label)}</text>',
    ]
    for tick in _ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT},{y(tick):.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    parts += [
        f'<text class="middle" x="{x(position):.1f}" y="{_HEIGHT - _BOTTOM + 20}">{escape(position)}</text>'
        for position in positions
    ]
    ends: list[tuple[float, float, str, str]] = []
    for index, (name, line) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        dash = ' stroke-dasharray="6 4"' if index >= len(_COLOURS) else ""
        dots = [(x(position), y(line[position]), position) for position in positions if position in line]
        path = "L".join(f"{left:.1f},{top:.1f}" for left, top, _ in dots)
        parts.append(f'<path class="line" stroke="{colour}"{dash} d="M{path}"/>')
        for left, top, position in dots:
            text = escape(f"{name}, {position}: {line[position]:.4g} {y_label}")
            parts.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colour}"><title>{text}</title></circle>'
            )
        ends.append((dots[-1][1], dots[-1][0], name, colour))
    below = -math.inf
    for top, left, name, colour in sorted(ends):  # names beside the ends, none over another
        below = max(top, below + _LABEL_STEP)
        parts.append(
            f'<path class="lead" stroke="{colour}" d="M{left + 5:.1f},{top:.1f}L{right + 4},{below:.1f}"/>'
        )
        parts.append(f'<text x="{right + 8}" y="{below + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def _nice(value: float, *, down: bool) -> float:
    """Return the nearest 1, 2 or 5 times a power of ten at or below, or at or above."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    if down:
        return max(step for step in steps if step <= value * (1 + 1e-9))
    return min(step for step in steps if step >= value * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten in a range; the powers alone where that would be crowded."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
