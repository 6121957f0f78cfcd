"""Charts as inline SVG: text stays text, and colours are CSS classes so that the page's theme decides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quantkit.compare.numbers import short
from quantkit.compare.result import Spread
from quantkit.recipe.schema import Threshold

_MAX_LINES = 300  # thin lines of single images; more are neither seen nor worth their bytes
_MAX_DOTS = 400


@dataclass(frozen=True)
class Mark:
    """Values to draw, and what a pointer over them reads: a line along the steps, or a single dot."""

    values: Sequence[float]
    label: str


@dataclass(frozen=True)
class _Frame:
    """A plot area inside an SVG; x and y map shares of 0 to 1 to its corners."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def x(self, share: float) -> float:
        return self.left + (self.width - self.left - self.right) * share

    def y(self, share: float) -> float:
        return self.height - self.bottom - (self.height - self.top - self.bottom) * share

    def open(self, css_class: str, title: str) -> str:
        return (
            f'<svg class="{css_class}" viewBox="0 0 {self.width} {self.height}" role="img">'
            f"<title>{escape(title)}</title>"
        )


def steps_chart(title: str, spread: Spread, lines: Sequence[Mark], floor: Sequence[float] = ()) -> str:
    """Draw how a non-negative quantity grows along the denoising steps, on a logarithmic axis.

    Args:
        title: What the chart shows, for screen readers.
        spread: Median and 10 to 90 % band over the images.
        lines: The single images.
        floor: What the same model run twice gives; drawn where it is above 0.

    Returns:
        An ``<svg>`` element, or a sentence in ``<p>`` if every value is 0.
    """
    positive = [value for line in lines for value in line.values if value > 0]
    if not positive:
        return '<p class="note">Exactly 0 at every step of every image: the trajectories are the same.</p>'
    frame = _Frame(width=560, height=340, left=62, right=82, top=14, bottom=48)
    low, high = _log_range(min(positive), max(positive))
    steps = len(spread.median)

    def x(step: int) -> float:
        return frame.x((step - 1) / (steps - 1) if steps > 1 else 0.5)

    def y(value: float) -> float:
        return frame.y(math.log(max(value, low) / low) / math.log(high / low))

    def points(values: Sequence[float]) -> list[str]:
        return [f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values, start=1)]

    def path(values: Sequence[float]) -> str:
        # One point alone would draw nothing; doubled, its round caps show.
        return "M" + "L".join(points(values) if len(values) > 1 else points(values) * 2)

    parts = [frame.open("chart", title)]
    for tick in _log_ticks(low, high):
        parts.append(f'<path class="grid" d="M{frame.left},{y(tick):.1f}H{frame.width - frame.right}"/>')
        parts.append(f'<text class="tick end" x="{frame.left - 8}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    parts += [
        f'<text class="tick middle" x="{x(step):.1f}" y="{frame.y(0) + 20:.1f}">{step}</text>'
        for step in _step_ticks(steps)
    ]
    parts.append(f'<text class="axis middle" x="{frame.x(0.5):.1f}" y="{frame.height - 6}">denoising step</text>')
    shown = lines[:: math.ceil(len(lines) / _MAX_LINES)]
    parts.append(f'<g class="single" style="opacity:{min(0.6, max(0.1, 6 / len(shown))):.2f}">')
    parts += [f'<path d="{path(line.values)}"><title>{escape(line.label)}</title></path>' for line in shown]
    parts.append("</g>")
    outline = "L".join(points(spread.p90) + points(spread.p10)[::-1])
    parts.append(f'<path class="band" d="M{outline}Z"/>')
    if any(value > 0 for value in floor):
        parts.append(f'<path class="floor" d="{path(floor)}"/>')
    parts.append(f'<path class="median" d="{path(spread.median)}"/>')
    last = spread.median[-1]
    parts.append(f'<circle class="endpoint" cx="{x(steps):.1f}" cy="{y(last):.1f}" r="4"/>')
    parts.append(f'<text class="endlabel" x="{x(steps) + 9:.1f}" y="{y(last) + 5:.1f}">{short(last)}</text>')
    column = (frame.x(1) - frame.x(0)) / max(steps - 1, 1)
    for step in range(1, steps + 1):
        text = (
            f"step {step}: median {short(spread.median[step - 1])}, "
            f"10 to 90 %: {short(spread.p10[step - 1])} to {short(spread.p90[step - 1])}, "
            f"worst {short(spread.maximum[step - 1])}"
        )
        parts.append(
            f'<g class="hover"><rect x="{x(step) - column / 2:.1f}" y="{frame.y(1):.1f}" width="{column:.1f}" '
            f'height="{frame.y(0) - frame.y(1):.1f}"/><path d="M{x(step):.1f},{frame.y(1):.1f}V{frame.y(0):.1f}"/>'
            f"<title>{escape(text)}</title></g>"
        )
    return "".join(parts) + "</svg>"


def swarm_chart(
    title: str, dots: Sequence[Mark], mean: float, threshold: Threshold | None, limits: tuple[float, float | None]
) -> str:
    """Draw one dot per prompt along the axis of a metric, the side beyond the threshold shaded.

    Args:
        title: What the chart shows, for screen readers.
        dots: One value per prompt.
        mean: Their mean, drawn as a line.
        threshold: Bounds of the metric.
        limits: Smallest and largest value that the metric can have.
    """
    frame = _Frame(width=560, height=132, left=18, right=18, top=12, bottom=34)
    values = [dot.values[0] for dot in dots]
    bounds = [bound for bound in ((threshold.min, threshold.max) if threshold else ()) if bound is not None]
    low, high = _padded_range([*values, *bounds], limits)

    def x(value: float) -> float:
        return frame.x((min(max(value, low), high) - low) / (high - low))

    parts = [frame.open("chart swarm", title)]
    if threshold is not None:
        for start, stop in _outside(threshold, low, high):
            parts.append(
                f'<rect class="bad" x="{x(start):.1f}" y="{frame.y(1):.1f}" width="{x(stop) - x(start):.1f}" '
                f'height="{frame.y(0) - frame.y(1):.1f}"/>'
            )
        parts += [
            f'<path class="bound" d="M{x(bound):.1f},{frame.y(1):.1f}V{frame.y(0):.1f}"/>' for bound in bounds
        ]
    parts.append(f'<path class="grid" d="M{frame.x(0):.1f},{frame.y(0):.1f}H{frame.x(1):.1f}"/>')
    for tick in _linear_ticks(low, high):
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="{frame.y(0) + 20:.1f}">{tick:g}</text>')
    parts.append(f'<path class="mean" d="M{x(mean):.1f},{frame.y(1):.1f}V{frame.y(0):.1f}"/>')
    shown = dots[:: math.ceil(len(dots) / _MAX_DOTS)]
    for dot, offset in zip(shown, _spread_out([x(dot.values[0]) for dot in shown]), strict=True):
        parts.append(
            f'<circle class="dot" cx="{x(dot.values[0]):.1f}" cy="{frame.y(0.5) + offset:.1f}" r="4.5">'
            f"<title>{escape(dot.label)}</title></circle>"
        )
    return "".join(parts) + "</svg>"


def interval_chart(title: str, mean: float, low: float, high: float, threshold: Threshold) -> str:
    """Draw a mean with its interval against the bounds, small enough for a table's cell."""
    frame = _Frame(width=180, height=26, left=6, right=6, top=3, bottom=3)
    bounds = [bound for bound in (threshold.min, threshold.max) if bound is not None]
    start, stop = _padded_range([low, high, *bounds], (-math.inf, None), pad=0.25)

    def x(value: float) -> float:
        return frame.x((value - start) / (stop - start))

    middle = frame.y(0.5)
    parts = [frame.open("interval", title)]
    parts.append(f'<path class="grid" d="M{frame.x(0):.1f},{middle:.1f}H{frame.x(1):.1f}"/>')
    for left, right in _outside(threshold, start, stop):
        parts.append(
            f'<rect class="bad" x="{x(left):.1f}" y="{frame.y(1):.1f}" width="{x(right) - x(left):.1f}" '
            f'height="{frame.y(0) - frame.y(1):.1f}"/>'
        )
    parts += [f'<path class="bound" d="M{x(bound):.1f},{frame.y(1)}V{frame.y(0)}"/>' for bound in bounds]
    parts.append(f'<path class="whisker" d="M{x(low):.1f},{middle:.1f}H{x(high):.1f}"/>')
    parts.append(f'<circle class="dot" cx="{x(mean):.1f}" cy="{middle:.1f}" r="4"/>')
    return "".join(parts) + "</svg>"


def _outside(threshold: Threshold, low: float, high: float) -> list[tuple[float, float]]:
    """Return the parts of an axis that are beyond the bounds."""
    parts = []
    if threshold.min is not None and threshold.min > low:
        parts.append((low, threshold.min))
    if threshold.max is not None and threshold.max < high:
        parts.append((threshold.max, high))
    return parts


def _log_range(smallest: float, largest: float) -> tuple[float, float]:
    """Return the range of a logarithmic axis, from a 1, 2 or 5 below to one above."""
    low = max(tick for tick in _one_two_five(smallest) if tick <= smallest)
    high = min(tick for tick in _one_two_five(largest) if tick >= largest)
    return (low, high) if high > low else (low, low * 10)


def _one_two_five(value: float) -> list[float]:
    exponent = math.floor(math.log10(value))
    return [factor * 10.0**power for power in (exponent - 1, exponent, exponent + 1) for factor in (1, 2, 5)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most eight ticks of a logarithmic axis, powers of ten with 2 and 5 between if there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    choices = [
        [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
        for stride, factors in ((1, (1, 2, 5)), (1, (1,)), (2, (1,)), (4, (1,)), (8, (1,)))
    ]
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    return next((ticks for ticks in inside if len(ticks) <= 8), inside[-1])


def _step_ticks(steps: int) -> list[int]:
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, 1000) if steps / stride <= 10 or stride == 1000)
    # A tick right beside the first would run into it.
    return [1, *(step for step in range(stride, steps + 1, stride) if step - 1 >= 0.75 * stride)]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    stride = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [round(index * stride, 12) for index in range(first, last + 1)]


def _padded_range(
    values: Sequence[float], limits: tuple[float, float | None], pad: float = 0.08
) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * pad or abs(high) * pad or pad
    least, most = limits[0], math.inf if limits[1] is None else limits[1]
    low, high = max(low - margin, least), min(high + margin, most)
    return (low, high) if high > low else (low - margin, high + margin)


def _spread_out(positions: Sequence[float], radius: float = 5.0, room: float = 34.0) -> list[float]:
    """Return vertical offsets that keep dots at these positions from covering each other while there is room."""
    lanes = [lane for step in range(int(room // radius) + 1) for lane in {step * radius, -step * radius}]
    placed: list[tuple[float, float]] = []
    offsets = [0.0] * len(positions)
    for index in sorted(range(len(positions)), key=positions.__getitem__):
        near = [(other, lane) for other, lane in placed[-60:] if positions[index] - other < 2 * radius]
        offsets[index] = next(
            (
                lane
                for lane in lanes
                if all(math.hypot(positions[index] - other, lane - taken) >= 1.8 * radius for other, taken in near)
            ),
            lanes[index % len(lanes)],
        )
        placed.append((positions[index], offsets[index]))
    return offsets
