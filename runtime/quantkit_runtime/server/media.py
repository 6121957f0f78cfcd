"""Pictures, videos and sounds: encoded for answers, decoded from requests within limits."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
import wave
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quantkit_runtime.server.errors import ApiError, bad_request
from quantkit_runtime.server.png import encode_png
from quantkit_runtime.x264 import steady_options

if TYPE_CHECKING:
    from quantkit_runtime.server.settings import Limits

ImageFormat = Literal["png", "jpeg", "webp"]

SOUND_RATE = 16_000
"""Samples per second of a decoded sound."""

SOUND_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/ogg",
}
"""Media types by the name of a format."""

_ENCODERS = {"mp3": ("libmp3lame", "mp3"), "flac": ("flac", "flac"), "opus": ("libopus", "ogg")}
_PICTURES = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Values of ``PIL.Image.Transpose`` by EXIF's orientation."""
_MAX_SCANS = 256  # of a JPEG; usual ones have ten, and each costs a pass over all pixels however few bytes it has
# Pillow tells of broken metadata in ever new words, and Python keeps each warning that it has shown.
warnings.filterwarnings("ignore", module=r"PIL\.")
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w-]+=[\w.-]+)*;base64,", re.ASCII)
# What the first bytes of a sound say it is; what a request calls it does not count. Only these demuxers are
# used: others open further files that the data names.
_SOUNDS = {
    b"RIFF": "wav",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
    b"\xff\xf3": "mp3",
    b"\xff\xf2": "mp3",
}
_ROUNDING_S = 1e-6  # of the sum of many frames
_LEAST_RATE = 4_000  # speech has 8000; at one sample a second a small file becomes hours, in one piece
# WAV and Ogg may hold any codec; only these are opened.
_CODECS = (
    *("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw"),
    *("mp3", "mp3float", "flac", "vorbis", "opus", "libopus"),
)


def encode_image(pixels: np.ndarray, form: ImageFormat = "png", quality: int = 90) -> bytes:
    """Encode a uint8 picture (height, width, 3)."""
    if form == "png":
        return encode_png(pixels)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form.upper(), quality=quality)
    return buffer.getvalue()


def encode_mp4(frames: np.ndarray, fps: int) -> bytes:
    """Encode uint8 frames (count, height, width, 3) as H.264 in MP4; equal frames give equal bytes."""
    import av

    _, height, width, _ = frames.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "18", "preset": "veryfast", **steady_options()}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height = width, height
        # Players expect half as many colours as pixels, which odd sizes cannot have.
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_sound(samples: np.ndarray, rate: int, form: str) -> bytes:
    """Encode float samples (count,) in [-1, 1]; ``form`` is a key of `SOUND_TYPES`."""
    short = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    if form in ("pcm", "pcm16"):
        return bytes(short.tobytes())
    buffer = io.BytesIO()
    if form == "wav":
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(short.tobytes())
        return buffer.getvalue()
    import av

    if not short.size:  # an answer too short to be spoken; these encoders take no empty frame
        short = np.zeros(rate // 10, np.int16)
    codec, container_name = _ENCODERS[form]
    with av.open(buffer, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=48_000 if form == "opus" else rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(short.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_image(data: bytes, limits: Limits, param: str, max_pixels: int | None = None) -> np.ndarray:
    """Decode a PNG, JPEG or WebP into uint8 (height, width, 3).

    Raises:
        ApiError: It is none of these, damaged or too large.
    """
    from PIL import Image, UnidentifiedImageError

    _check_bytes(data, limits, param)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise bad_request(f"{param}: a JPEG of more than {_MAX_SCANS} scans", param, "invalid_image")
    try:
        with Image.open(io.BytesIO(data), formats=_PICTURES) as picture:
            width, height = picture.size
            if width * height > (limits.max_upload_pixels if max_pixels is None else max_pixels):
                raise ApiError(
                    413,
                    f"{param}: {width}x{height} pixels; at most {limits.max_upload_pixels} in one request",
                    param=param,
                    code="image_too_large",
                )
            turn = _turn_of(picture)
            upright = _in_8_bits(picture)
            return np.asarray((upright if turn is None else upright.transpose(turn)).convert("RGB"))
    except UnidentifiedImageError:
        raise bad_request(f"{param}: is no PNG, JPEG or WebP picture", param, "invalid_image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise bad_request(f"{param}: cannot be decoded ({error})", param, "invalid_image") from None


def _turn_of(picture: Any) -> int | None:
    """Return how a photograph is turned back; None where it says nothing that can be read.

    Pillow's ``exif_transpose`` writes the other tags anew, and fails on those that have odd types.
    """
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return None


def _in_8_bits(picture: Any) -> Any:
    """Return a picture of grey in 16 bits in 8, which Pillow would cut at 255, not scale."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def decode_audio(data: bytes, limits: Limits, param: str, max_s: float | None = None) -> np.ndarray:
    """Decode a WAV, MP3, FLAC or Ogg into float32 (samples,): one channel, `SOUND_RATE` a second.

    Args:
        data: The file.
        limits: Of bytes and seconds.
        param: Field of the request, for errors.
        max_s: Less than the limit, where other sounds have used it.

    Raises:
        ApiError: It is none of these, damaged or too long.
    """
    import av

    _check_bytes(data, limits, param)
    form = next((name for magic, name in _SOUNDS.items() if data.startswith(magic)), None)
    if form is None:
        raise bad_request(f"{param}: is no WAV, MP3, FLAC or Ogg sound", param, "invalid_audio")
    parts: list[np.ndarray] = []
    left_s = limits.max_audio_s if max_s is None else max_s
    try:
        allowed = {"codec_whitelist": ",".join(_CODECS)}
        with av.open(io.BytesIO(data), format=form, options=allowed, metadata_errors="replace") as container:
            stream = container.streams.audio[0]
            codec = stream.codec_context.name if stream.codec_context is not None else "unknown"
            if codec not in _CODECS:
                raise bad_request(f"{param}: its codec, {codec}, is not read here", param, "invalid_audio")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)
            frames = container.decode(stream)
            for frame in frames:
                if frame.sample_rate < _LEAST_RATE:
                    raise bad_request(
                        f"{param}: has {frame.sample_rate} samples a second; at least {_LEAST_RATE} are read here",
                        param,
                        "invalid_audio",
                    )
                left_s -= frame.samples / frame.sample_rate  # before it is resampled, which may take any memory
                if left_s < -_ROUNDING_S:
                    raise ApiError(
                        413,
                        f"{param}: more than {limits.max_audio_s:g} s of sound in one request",
                        param=param,
                        code="audio_too_long",
                    )
                parts += [piece.to_ndarray().reshape(-1) for piece in resampler.resample(frame)]
            parts += [piece.to_ndarray().reshape(-1) for piece in resampler.resample(None)]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise bad_request(f"{param}: cannot be decoded ({error})", param, "invalid_audio") from None
    if not parts:
        raise bad_request(f"{param}: holds no sound", param, "invalid_audio")
    return np.concatenate(parts).astype(np.float32)


def decode_base64(text: str, limits: Limits, param: str) -> bytes:
    """Decode base64, with or without ``data:...;base64,`` before it.

    Raises:
        ApiError: It is no base64, or too large.
    """
    found = _DATA_URL.match(text[:200])
    payload = text[found.end() :] if found else text
    if len(payload) * 3 // 4 > limits.max_upload_bytes + 3:
        raise _too_large(param, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{param}: is no base64", param, "invalid_base64") from None


def _check_bytes(data: bytes, limits: Limits, param: str) -> None:
    if not data:
        raise bad_request(f"{param}: is empty", param)
    if len(data) > limits.max_upload_bytes:
        raise _too_large(param, limits)


def _too_large(param: str, limits: Limits) -> ApiError:
    return ApiError(
        413, f"{param}: larger than {limits.max_upload_bytes} bytes", param=param, code="upload_too_large"
    )
