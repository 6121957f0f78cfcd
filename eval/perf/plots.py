"""Plots of serve.py as one page: inline SVG, light and dark, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from typing import Any

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 16, 46
_KINDS = (("image", "images per second", "per_s"), ("chat", "tokens per second", "tokens_per_s"))
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1d22, #e8e8ea); --soft: light-dark(#62666f, #9aa0ab);
  --line: light-dark(#dcdad4, #31363f); --paper: light-dark(#f6f5f2, #14161a);
  --BF16: light-dark(#8a5a00, #e0b050); --W4A16: light-dark(#0b6e62, #43c6b3); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1180px;
  margin: 32px auto; padding: 0 20px; }
p { color: var(--soft); } figure { display: inline-block; margin: 0 12px 24px 0; }
figcaption { font-weight: 600; margin-bottom: 6px; } text { font-size: 12px; fill: var(--soft); }
.axis { stroke: var(--line); } .BF16 { stroke: var(--BF16); fill: var(--BF16); }
.W4A16 { stroke: var(--W4A16); fill: var(--W4A16); } polyline { fill: none !important; stroke-width: 2; }
text.BF16, text.W4A16 { stroke: none; font-weight: 600; }
"""


def page(result: dict[str, Any]) -> str:
    """Return an HTML page for the result of serve.py."""
    rows = [row for row in result["rows"] if row["loop"].startswith("closed") and not row["replicas"]]
    figures = []
    for kind, unit, key in _KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            figures.append(_figure(f"{kind}: latency over throughput", chosen, key, unit))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = html.escape(f"{result['date']}, {result['machine']}; {versions}; runs of {result['seconds']:g} s.")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Serving</title><style>{_STYLE}</style>"
        f"<h1>Serving</h1><p>{about} Numbers at the points: callers of the closed loop.</p>"
        f"{''.join(figures)}</html>"
    )


def _figure(title: str, rows: list[dict[str, Any]], key: str, unit: str) -> str:
    most_x = 1.1 * max(row[key] for row in rows)
    most_y = 1.1 * max(row["latency_s"]["p50"] for row in rows)

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = _LEFT + row[key] / most_x * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - row["latency_s"]["p50"] / most_y * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(most_x, most_y, unit)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        points = [place(row) for row in own]
        parts.append(f'<polyline class="{variant}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        for row, (x, y) in zip(own, points, strict=True):
            parts.append(f'<circle class="{variant}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
            callers = row["loop"].partition(", ")[2]
            parts.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{callers}</text>')
        x, y = points[-1]
        parts.append(f'<text class="{variant}" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{variant}</text>')
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def _axes(most_x: float, most_y: float, unit: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for part in range(5):
        y = bottom - part / 4 * (bottom - _TOP)
        x = _LEFT + part / 4 * (right - _LEFT)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{part / 4 * most_y:.2f}</text>')
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{part / 4 * most_x:.3g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{unit}</text>')
    middle = (_TOP + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text x="14" y="{middle}" {turned}>median latency, s</text>')
    return "".join(parts)
