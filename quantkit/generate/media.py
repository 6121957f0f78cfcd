"""Frames as files: an image, a video as MP4, GIF or a folder of PNG."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import MissingExtraError
from quantkit_runtime.x264 import steady_options

if TYPE_CHECKING:
    import numpy as np


def write_image(path: Path, frames: np.ndarray) -> None:
    """Write the first of the uint8 frames (frames, height, width, 3), its kind told by the suffix."""
    from PIL import Image

    Image.fromarray(frames[0]).save(path)


def write_video(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    """Write uint8 frames (frames, height, width, 3) as ``.mp4``, ``.gif`` or, without a suffix, a folder of PNG."""
    if path.suffix.lower() == ".mp4":
        _write_mp4(path, frames, frames_per_second)
    elif path.suffix.lower() == ".gif":
        _write_gif(path, frames, frames_per_second)
    else:
        path.mkdir()
        for index in range(len(frames)):
            write_image(path / f"frame{index:04d}.png", frames[index : index + 1])


def check_video_encoder() -> None:
    """Refuse MP4 where nothing can encode it.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    if find_spec("av") is None:
        raise MissingExtraError("av (needed for .mp4; .gif and folders of frames do without)", "video")


def _write_mp4(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    """Encode H.264, visually lossless, equal frames to equal bytes; odd sides lose their last row or column."""
    import av

    height, width = (side - side % 2 for side in frames.shape[1:3])
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "16", **steady_options()}
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame[:height, :width].copy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_second), loop=0)
