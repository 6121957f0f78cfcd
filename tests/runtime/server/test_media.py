"""Pictures, videos and sounds, in and out."""

import io
import struct
from contextlib import suppress

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.media import (
    SOUND_TYPES,
    decode_audio,
    decode_base64,
    decode_image,
    encode_mp4,
    encode_sound,
)
from quantkit_runtime.server.png import encode_png
from quantkit_runtime.server.settings import Limits

LIMITS = Limits(max_upload_bytes=10_000, max_upload_pixels=64 * 64, max_audio_s=1.0)


def saved(form, size=(20, 10), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, 0).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 1), (64, 48), (700, 500)])
@pytest.mark.parametrize("fill", ["noise", "flat"])
def test_png_keeps_every_pixel(size, fill):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if fill == "flat":
        pixels[:] = (7, 8, 255)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


@pytest.mark.parametrize("size", [(32, 48), (31, 17)])
def test_mp4_has_every_frame_at_its_size_and_rate(size):
    ramp = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 3 * size[0] * size[1]).reshape(5, *size, 3)
    with av.open(io.BytesIO(encode_mp4(ramp, 12))) as container:
        assert container.streams.video[0].average_rate == 12
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == ramp.shape
    assert np.abs(frames.astype(int) - ramp).max() < 6


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("JPEG", "L"), ("WEBP", "RGB")]
)
def test_pictures_of_any_mode_become_rgb(form, mode):
    assert decode_image(saved(form, mode=mode), LIMITS, "image").shape == (10, 20, 3)


def test_a_turned_photograph_is_turned_back():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    assert decode_image(saved("JPEG", exif=exif), LIMITS, "image").shape == (20, 10, 3)


def exif_of(*tags):
    """Return EXIF of tags as they are given: number, type, count, value."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("odd", [(0x0100, 11, 1, struct.pack("<f", 64.0)), (0x010E, 11, 1, struct.pack("<f", 1.0))])
def test_odd_metadata_keeps_no_photograph_from_being_turned(odd):
    turned = (0x0112, 3, 1, struct.pack("<I", 6))
    data = saved("JPEG", exif=exif_of(*sorted([odd, turned])))
    assert decode_image(data, LIMITS, "image").shape == (20, 10, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    assert np.array_equal(decode_image(buffer.getvalue(), LIMITS, "image"), np.asarray(expected))


def test_grey_of_16_bits_is_scaled():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32_768, 65_535]], np.uint16)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), LIMITS, "image")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_not_even_tried(form):
    with pytest.raises(ApiError) as caught:
        decode_image(saved(form), LIMITS, "image")
    assert caught.value.code == "invalid_image"


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded():
    bomb = saved("PNG", (2000, 2000), "1")
    assert len(bomb) < LIMITS.max_upload_bytes
    with pytest.raises(ApiError) as caught:
        decode_image(bomb, LIMITS, "image")
    assert (caught.value.status, caught.value.code) == (413, "image_too_large")


def test_a_jpeg_of_many_scans_is_refused_before_each_costs_a_pass():
    data = saved("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data[:-2] + scan * 200 + data[-2:], LIMITS, "image").shape == (10, 20, 3)
    with pytest.raises(ApiError, match="scans"):
        decode_image(data[:-2] + scan * 300 + data[-2:], LIMITS, "image")


def wav(codec=1, title=b""):
    layout = struct.pack("<HHIIHH", codec, 1, 16_000, 16_000, 1, 8)
    info = b"LIST" + struct.pack("<I", 12 + len(title)) + b"INFOINAM" + struct.pack("<I", len(title)) + title
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + info + b"data" + struct.pack("<I", 2000) + b"\x80" * 2000
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_title_in_another_encoding_does_not_spoil_a_sound():
    assert decode_audio(wav(title=b"caf\xe9"), LIMITS, "sound").shape == (2000,)


def test_other_codecs_are_not_opened():
    with pytest.raises(ApiError, match="wmav2"):
        decode_audio(wav(codec=0x161), LIMITS, "sound")


@pytest.mark.parametrize(
    ("form", "rate"), [("wav", 16_000), ("wav", 44_100), ("mp3", 24_000), ("flac", 8_000), ("opus", 24_000)]
)
def test_sounds_come_back_at_one_rate(form, rate):
    seconds = 0.2
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    limits = Limits(max_upload_bytes=100_000, max_audio_s=1.0)
    samples = decode_audio(encode_sound(wave, rate, form), limits, "sound")
    assert samples.dtype == np.float32
    assert 0.19 < samples.size / 16_000 < 0.32  # lossy formats pad
    assert 0.4 < np.abs(samples).max() < 0.65


@pytest.mark.parametrize("form", SOUND_TYPES)
def test_an_answer_without_sound_is_a_short_silence_at_most(form):
    data = encode_sound(np.zeros(0, np.float32), 24_000, form)
    assert (form in ("pcm", "pcm16")) == (data == b"")
    if form in ("mp3", "flac", "opus"):
        assert 0 < decode_audio(data, LIMITS, "sound").size < 4_000


def sound_of(samples, rate):
    """Return a FLAC that declares any rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=rate, layout="mono", options={"frame_size": "65535"})
        frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_a_sound_of_few_samples_a_second_is_refused_before_it_becomes_hours(monkeypatch):
    monkeypatch.setattr(av, "AudioResampler", lambda **_options: None)  # what it resamples would fail
    with pytest.raises(ApiError, match="1 samples a second") as caught:
        decode_audio(sound_of(65_535, 1), LIMITS, "sound")
    assert caught.value.code == "invalid_audio"


def test_a_long_sound_is_refused_before_it_is_resampled(monkeypatch):
    monkeypatch.setattr(av, "AudioResampler", lambda **_options: None)
    with pytest.raises(ApiError) as caught:
        decode_audio(sound_of(65_535, 8_000), LIMITS, "sound")
    assert (caught.value.status, caught.value.code) == (413, "audio_too_long")


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_a_sound_of_exactly_the_limit_is_taken(rate):
    limits = Limits(max_audio_s=7.0)
    samples = decode_audio(encode_sound(np.zeros(7 * rate, np.float32), rate, "wav"), limits, "sound")
    assert samples.size == 7 * 16_000


MAGIC = (b"", b"\x89PNG\r\n\x1a\n", b"RIFF", b"OggS", b"ID3", b"fLaC", b"\xff\xd8")


@given(st.binary(max_size=300), st.sampled_from(MAGIC))
@settings(max_examples=60, deadline=None)
def test_nonsense_is_always_a_mistake_of_the_caller(data, magic):
    for decode in (decode_image, decode_audio):
        with pytest.raises(ApiError) as caught:
            decode(magic + data, LIMITS, "field")
        assert 400 <= caught.value.status < 500
        assert caught.value.param == "field"


@given(st.text(max_size=100))
@settings(max_examples=60, deadline=None)
def test_base64_is_decoded_or_refused(text):
    for written in (text, f"data:image/png;base64,{text}"):
        with suppress(ApiError):
            assert isinstance(decode_base64(written, LIMITS, "field"), bytes)
