"""Images and videos inside the report, as ``data:`` URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import CheckpointError

_LOSSLESS_PIXELS = 256
_THUMBNAIL_PIXELS = 448
_WEBP_QUALITY = 82
_LOSSLESS_FRAME_PIXELS = 96
_FRAME_PIXELS = 320


@dataclass(frozen=True)
class Embedded:
    """A picture as the page needs it.

    Attributes:
        uri: ``data:`` URI.
        pixelated: Whether it is small, so that enlarging it should show its pixels.
    """

    uri: str
    pixelated: bool


def embed(path: Path) -> Embedded:
    """Return an image as a ``data:`` URI: lossless up to 256 pixels, larger ones as a WebP of at most 448.

    Raises:
        CheckpointError: If the file is no image that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = max(image.size) <= _LOSSLESS_PIXELS
            if small and image.format == "PNG":
                return Embedded(_uri("png", path.read_bytes()), pixelated=True)
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as an image: {error}") from error
    return Embedded(_webp(thumbnail, lossless=small), pixelated=small)


def embed_frames(frames: np.ndarray) -> Embedded:
    """Return uint8 frames (frames, height, width, 3) as one tall picture: WebP, each frame at most 320 pixels.

    A single picture keeps the players of a page in step and can be wound to any frame. Small frames lose nothing.
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    small = max(height, width) <= _LOSSLESS_FRAME_PIXELS
    scale = min(1.0, _FRAME_PIXELS / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = Image.new("RGB", (size[0], size[1] * len(frames)))
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        sheet.paste(picture if small else picture.resize(size, Image.Resampling.LANCZOS), (0, index * size[1]))
    return Embedded(_webp(sheet, lossless=small), pixelated=small)


def _webp(picture: Any, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_WEBP_QUALITY, lossless=lossless)
    return _uri("webp", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
