"""Pictures and videos as files: PNG, a video as a folder of one PNG per frame, so that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quantkit.errors import CheckpointError


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture (height, width, 3) as PNG."""
    from PIL import Image

    Image.fromarray(picture).save(path)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture that `write_picture` wrote: uint8 (height, width, 3).

    Raises:
        CheckpointError: If the file is missing or no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as an image: {error}") from error


def write_video(folder: Path, frames: np.ndarray) -> None:
    """Write uint8 frames (frames, height, width, 3) into a new folder."""
    folder.mkdir()
    for index, frame in enumerate(frames):
        write_picture(folder / frame_name(index), frame)


def read_video(folder: Path, frames: Iterable[int]) -> np.ndarray:
    """Read these frames of a video that `write_video` wrote: uint8 (frames, height, width, 3).

    Raises:
        CheckpointError: If one of the frames is missing or no picture.
    """
    return np.stack([read_picture(folder / frame_name(index)) for index in frames])


def frame_name(index: int) -> str:
    """Return the name of a frame's file."""
    return f"frame{index:04d}.png"
