"""What both models made, prompt by prompt, as the report's templates need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.compare.charts import row_chart
from quantkit.compare.difference import absolute_error, paint
from quantkit.compare.embed import embed, embed_frames
from quantkit.compare.frames import sampled
from quantkit.compare.kinds import KINDS, Kind
from quantkit.compare.media import read_video
from quantkit.compare.metrics import METRICS
from quantkit.compare.numbers import short
from quantkit.compare.result import AnswerOutput, Comparison, ImageOutput, Item, VideoOutput

BUDGET_BYTES = 16 * 2**20
"""Base64 text of pictures in one report; those beyond it stay files beside the report."""

PLAYED_FRAMES = 48
"""Frames of a video in its player at most, evenly spaced; stacked they must stay below WebP's 16383 pixels."""

STRIP_FRAMES = 6

_FRAMES_PER_SECOND = 16
_MIN_SECONDS = 1.5


def gallery(
    result: Comparison, groups: Sequence[Sequence[Item]], folder: Path, budget_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """Return the prompts shown with their outputs, worst first, and how many there was no room for."""
    kind = KINDS[result.task]
    shown: list[dict[str, Any]] = []
    used = 0
    for group in groups:
        entries = [_entry(item, folder, kind) for item in group]
        used += sum(len(panel["uri"]) for entry in entries for panel in entry.get("panels", ()))
        if shown and used > budget_bytes:
            break
        prompt = result.prompts[group[0].prompt]
        picture = embed(folder / prompt.image) if prompt.image is not None else None
        shown.append({"index": group[0].prompt, "text": prompt.text, "picture": picture, "entries": entries})
    return shown, len(groups) - len(shown)


def _entry(item: Item, folder: Path, kind: Kind) -> dict[str, Any]:
    output = item.output
    if isinstance(output, ImageOutput):
        made = _image(output, folder)
    elif isinstance(output, VideoOutput):
        made = _video(output, folder, item.curves.get("frame_psnr", ()))
    else:
        made = _answer(output)
    return {"item": item, "numbers": _numbers(item.metrics, kind), "failure": item.failure, **made}


def _numbers(metrics: Mapping[str, float], kind: Kind) -> list[tuple[str, str]]:
    return [
        (label, f"{short(metrics[name])} {METRICS[name].unit}".strip())
        for name, label in kind.captions.items()
        if name in metrics
    ]


def _panel(role: str, uri: str = "", *, pixelated: bool = False) -> dict[str, Any]:
    return {"role": role, "uri": uri, "pixelated": pixelated}


def _image(output: ImageOutput, folder: Path) -> dict[str, Any]:
    panels = []
    for role in ("reference", "candidate", "difference"):
        name = getattr(output, role)
        picture = embed(folder / name) if name is not None else None
        panels.append(_panel(role, picture.uri, pixelated=picture.pixelated) if picture else _panel(role))
    return {"panels": panels}


def _video(output: VideoOutput, folder: Path, psnr: Sequence[float]) -> dict[str, Any]:
    played = sampled(output.frames, PLAYED_FRAMES)
    reference = read_video(folder / output.reference, played)
    panels = [_sheet("reference", reference)]
    if output.candidate is None:
        panels += [_panel("candidate"), _panel("difference")]
    else:
        candidate = read_video(folder / output.candidate, played)
        errors = paint(absolute_error(reference, candidate), "absolute error")
        panels += [_sheet("candidate", candidate), _sheet("difference", errors)]
    height, width = reference.shape[1:3]
    return {
        "panels": panels,
        "count": len(played),
        "numbers_of_frames": [index + 1 for index in played],
        "strip": sampled(len(played), STRIP_FRAMES),
        "ratio": f"{width} / {height}",
        "seconds": max(output.frames / _FRAMES_PER_SECOND, _MIN_SECONDS),
        "psnr": _psnr_row(psnr) if psnr else None,
    }


def _psnr_row(psnr: Sequence[float]) -> dict[str, str]:
    worst = min(range(len(psnr)), key=psnr.__getitem__)
    caption = f"PSNR of every frame, {short(psnr[worst])} dB at frame {worst + 1} to {short(max(psnr))} dB"
    return {"caption": caption, "chart": row_chart(caption, psnr)}


def _sheet(role: str, frames: np.ndarray) -> dict[str, Any]:
    sheet = embed_frames(frames)
    return _panel(role, sheet.uri, pixelated=sheet.pixelated)


def _answer(output: AnswerOutput) -> dict[str, Any]:
    """Return both texts in runs of tokens that look alike."""
    marks = [
        "" if agrees else f"probability {short(probability)} in the candidate, which prefers another token"
        for agrees, probability in zip(output.agreement, output.probability, strict=True)
    ]
    marks = marks or [""] * len(output.reference)  # an answer that could not be scored
    same = len(output.candidate) if output.first_difference is None else output.first_difference
    own = [""] * same + ["from the first other token on"] * (len(output.candidate) - same)
    return {"reference": _runs(output.reference, marks), "candidate": _runs(output.candidate, own)}


def _runs(pieces: Sequence[str], marks: Sequence[str]) -> list[tuple[str, str]]:
    """Join neighbouring pieces that carry the same mark."""
    runs: list[tuple[str, str]] = []
    for piece, mark in zip(pieces, marks, strict=True):
        if runs and runs[-1][1] == mark:
            runs[-1] = (runs[-1][0] + piece, mark)
        else:
            runs.append((piece, mark))
    return runs
