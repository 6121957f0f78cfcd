"""Images inside the report, within a bound on the file's size."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import CheckpointError

IMAGE_BUDGET_BYTES = 16 * 2**20
"""Base64 text of images in one report; images beyond it stay files beside the report."""

_LOSSLESS_PIXELS = 256
_THUMBNAIL_PIXELS = 448
_WEBP_QUALITY = 82


@dataclass(frozen=True)
class Embedded:
    """An image as the page needs it.

    Attributes:
        uri: ``data:`` URI.
        pixelated: Whether it is small, so that enlarging it should show its pixels.
    """

    uri: str
    pixelated: bool


def embed(path: Path) -> Embedded:
    """Return an image as a ``data:`` URI: up to 256 pixels as it is, larger ones as a WebP of at most 448.

    Raises:
        CheckpointError: If the file is no image that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if max(image.size) <= _LOSSLESS_PIXELS:
                return Embedded(_uri("png", path.read_bytes()), pixelated=True)
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as an image: {error}") from error
    buffer = io.BytesIO()
    thumbnail.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return Embedded(_uri("webp", buffer.getvalue()), pixelated=False)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
