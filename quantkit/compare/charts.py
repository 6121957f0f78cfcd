"""Charts as inline SVG: text stays text, and colours are CSS classes so that the page's theme decides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quantkit.compare.metrics import Curve
from quantkit.compare.numbers import short
from quantkit.compare.result import Spread
from quantkit.recipe.schema import Threshold

_MAX_LINES = 300  # thin lines of single items; more are neither seen nor worth their bytes
_MAX_DOTS = 400
_MAX_HOVERS = 200


@dataclass(frozen=True)
class Mark:
    """Values to draw, and what a pointer over them reads: a line along an axis, or a single dot."""

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


def curve_chart(curve: Curve, spread: Spread, lines: Sequence[Mark], floor: Sequence[float] = ()) -> str:
    """Draw a curve of every item along its axis with the distribution over the items.

    Args:
        curve: What is drawn.
        spread: Median and 10 to 90 % band over the items.
        lines: The single items.
        floor: What the same model run twice gives; drawn where it is above 0, on a logarithmic axis alone.

    Returns:
        An ``<svg>`` element, or a sentence in ``<p>`` if every value on a logarithmic axis is 0.
    """
    frame = _Frame(width=560, height=340, left=62, right=82, top=14, bottom=48)
    values = [value for line in lines for value in line.values]
    if curve.logarithmic:
        positive = [value for value in values if value > 0]
        if not positive:
            return f'<p class="note">Exactly 0 at every {curve.axis}.</p>'
        low, high = _log_range(min(positive), max(positive))
        ticks = _log_ticks(low, high)
    else:
        low, high = _padded_range(values, (None, None))
        ticks = _linear_ticks(low, high)
    count = len(spread.median)

    def x(index: int) -> float:
        return frame.x(index / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        if curve.logarithmic:
            return frame.y(math.log(max(value, low) / low) / math.log(high / low))
        return frame.y((value - low) / (high - low))

    def points(values: Sequence[float]) -> list[str]:
        return [f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values)]

    def path(values: Sequence[float]) -> str:
        # One point alone would draw nothing; doubled, its round caps show.
        return "M" + "L".join(points(values) if len(values) > 1 else points(values) * 2)

    parts = [frame.open("chart", curve.label)]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{frame.left},{y(tick):.1f}H{frame.width - frame.right}"/>')
        parts.append(f'<text class="tick end" x="{frame.left - 8}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    parts += [
        f'<text class="tick middle" x="{x(number - curve.first):.1f}" y="{frame.y(0) + 20:.1f}">{number}</text>'
        for number in _number_ticks(curve.first, curve.first + count - 1)
    ]
    parts.append(f'<text class="axis middle" x="{frame.x(0.5):.1f}" y="{frame.height - 6}">{curve.axis}</text>')
    shown = [line for line in lines[:: math.ceil(len(lines) / _MAX_LINES)] if line.values]
    parts.append(f'<g class="single" style="opacity:{min(0.6, max(0.1, 6 / len(shown))):.2f}">')
    parts += [f'<path d="{path(line.values)}"><title>{escape(line.label)}</title></path>' for line in shown]
    parts.append("</g>")
    outline = "L".join(points(spread.p90) + points(spread.p10)[::-1])
    parts.append(f'<path class="band" d="M{outline}Z"/>')
    if curve.logarithmic and any(value > 0 for value in floor):
        parts.append(f'<path class="floor" d="{path(floor)}"/>')
    parts.append(f'<path class="median" d="{path(spread.median)}"/>')
    last = spread.median[-1]
    parts.append(f'<circle class="endpoint" cx="{x(count - 1):.1f}" cy="{y(last):.1f}" r="4"/>')
    parts.append(f'<text class="endlabel" x="{x(count - 1) + 9:.1f}" y="{y(last) + 5:.1f}">{short(last)}</text>')
    stride = math.ceil(count / _MAX_HOVERS)
    column = (frame.x(1) - frame.x(0)) * stride / max(count - 1, 1)
    for index in range(0, count, stride):
        worst = spread.maximum[index] if curve.logarithmic else spread.minimum[index]
        text = (
            f"{curve.axis} {curve.first + index}: median {short(spread.median[index])}, "
            f"10 to 90 %: {short(spread.p10[index])} to {short(spread.p90[index])}, worst {short(worst)}, "
            f"of {spread.count[index]}"
        )
        parts.append(
            f'<g class="hover"><rect x="{x(index) - column / 2:.1f}" y="{frame.y(1):.1f}" width="{column:.1f}" '
            f'height="{frame.y(0) - frame.y(1):.1f}"/><path d="M{x(index):.1f},{frame.y(1):.1f}V{frame.y(0):.1f}"/>'
            f"<title>{escape(text)}</title></g>"
        )
    return "".join(parts) + "</svg>"


def row_chart(title: str, values: Sequence[float]) -> str:
    """Draw one row of numbers from left to right, the smallest marked, without text: it stretches to any width."""
    frame = _Frame(width=1000, height=50, left=0, right=0, top=4, bottom=4)
    low, high = _padded_range(values, (None, None), pad=0.05)
    count = len(values)
    spots = [
        f"{frame.x((index + 0.5) / count):.1f},{frame.y((value - low) / (high - low)):.1f}"
        for index, value in enumerate(values)
    ]
    worst = frame.x((min(range(count), key=values.__getitem__) + 0.5) / count)
    return (
        f'<svg class="row" viewBox="0 0 {frame.width} {frame.height}" preserveAspectRatio="none" role="img">'
        f'<title>{escape(title)}</title><path class="bound" d="M{worst:.1f},0V{frame.height}"/>'
        f'<path class="median" d="M{"L".join(spots)}"/></svg>'
    )


def swarm_chart(
    title: str,
    dots: Sequence[Mark],
    mean: float,
    threshold: Threshold | None,
    limits: tuple[float | None, float | None],
) -> str:
    """Draw one dot per prompt along the axis of a metric, the side beyond the threshold shaded.

    Args:
        title: What the chart shows, for screen readers.
        dots: One value per prompt.
        mean: Their mean, drawn as a line.
        threshold: Bounds of the metric.
        limits: Smallest and largest value that the metric can have, None where there is none.
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
    start, stop = _padded_range([low, high, *bounds], (None, None), pad=0.25)

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


def _number_ticks(first: int, last: int) -> list[int]:
    span = last - first + 1
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, 1000) if span / stride <= 10 or stride == 1000)
    # A tick right beside the first would run into it.
    multiples = range(-(-first // stride) * stride, last + 1, stride)
    return [first, *(number for number in multiples if number > first and number - first >= 0.75 * stride)]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    stride = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [round(index * stride, 12) for index in range(first, last + 1)]


def _padded_range(
    values: Sequence[float], limits: tuple[float | None, float | None], pad: float = 0.08
) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * pad or abs(high) * pad or pad
    least, most = -math.inf if limits[0] is None else limits[0], math.inf if limits[1] is None else limits[1]
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
