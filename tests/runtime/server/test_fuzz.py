"""Forms, uploads and base64 that no client would send: always an answer, never a defect, never a hang."""

import base64
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quantkit_runtime.server.media import encode_sound

EXAMPLES = int(os.environ.get("QUANTKIT_FUZZ_EXAMPLES", "25"))
PATIENCE_S = 10.0

FORMS = {"/v1/images/edits": "image", "/v1/videos/sync": "input_reference", "/v1/videos": "input_reference"}
FIELDS = [
    *("model", "prompt", "negative_prompt", "size", "width", "height", "num_inference_steps", "guidance_scale"),
    *("guidance_scale_2", "true_cfg_scale", "max_sequence_length", "seed", "user", "n", "response_format"),
    *(
        "output_format",
        "output_compression",
        "strength",
        "num_frames",
        "seconds",
        "fps",
        "image",
        "input_reference",
    ),
]
JSON_FIELDS = {
    "/v1/images/generations": {"prompt": "a cat"},
    "/v1/audio/speech": {"input": "a cat"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a cat"}]},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # as the server itself does
    # Starlette leaves the file that a form is cut off in to the collector, which ends it at once.
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled:ResourceWarning"),
]
fuzzed = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def client(serve):
    client = serve("images", "editor", "videos", "chat", max_jobs=1_000_000)
    client.timeout = PATIENCE_S
    return client


def answered(client, path, content, headers):
    """Send a request, and check that the answer is one for the caller."""
    done = client.post(path, content=content, headers=headers)
    assert done.status_code < 500, done.text
    if done.status_code >= 400:
        assert set(done.json()["error"]) == {"message", "type", "param", "code"}
    return done


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, more=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def picture(form, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 200)).save(buffer, form, **options)
    return buffer.getvalue()


def wav(rate=16_000, channels=1, bits=8, codec=1, length=None, more=b""):
    samples = b"\x80" * 2000
    layout = struct.pack("<HHIIHH", codec, channels, rate, rate, channels * bits // 8 % 65536, bits)
    data = b"data" + struct.pack("<I", len(samples) if length is None else length) + samples
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + more + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_scans(count):
    """Return a progressive JPEG whose last scan is there so many times more: each costs a pass over its pixels."""
    data = picture("JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


ZEROS = zlib.compress(bytes(40_000_000), 9)
EXIF = Image.Exif()
EXIF[0x0112] = 6
SILENCE = np.zeros(16_000, np.float32)
PICTURES = [
    *(picture(form) for form in ("PNG", "JPEG", "WEBP", "GIF")),
    *(picture(form, exif=EXIF) for form in ("PNG", "JPEG", "WEBP")),
    picture("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))] * 3),
    jpeg_of_scans(300),
    png(60_000, 60_000, zlib.compress(b"")),
    png(500, 500, ZEROS),
    *(png(16, 16, zlib.compress(bytes(800)), chunk(kind, b"a\0\0" + ZEROS)) for kind in (b"zTXt", b"iCCP")),
    png(16, 16, zlib.compress(bytes(800)), chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x02\0" * 20)),
]
SOUNDS = [
    *(encode_sound(SILENCE, 16_000, form) for form in ("wav", "mp3", "flac", "opus")),
    encode_sound(np.zeros(16_000 * 60, np.float32), 16_000, "flac"),  # longer than allowed
    *(wav(rate=rate) for rate in (0, 1, 7, 2**31, 2**32 - 1)),
    *(wav(channels=channels) for channels in (0, 64, 65535)),
    *(wav(bits=bits) for bits in (0, 3, 64, 65535)),
    *(wav(codec=codec) for codec in (0, 0x55, 0x161, 0x270, 0xFFFE)),
    wav(length=2**32 - 1),
    wav(more=b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"),
    b"OggS" * 5000,
]


@st.composite
def damaged(draw, files):
    """A file as it is, cut, with other bytes in it, or with another file before or after."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["cut", "bytes", "before", "after", "repeat"]))
        at = draw(st.integers(0, min(len(data), 400)))
        if kind == "cut":
            del data[at:]
        elif kind == "bytes":
            other = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(other)] = other
        elif kind == "repeat":
            data[at:at] = data[: draw(st.integers(0, 200))] * draw(st.integers(1, 20))
        else:
            other = draw(st.sampled_from(PICTURES + SOUNDS))
            data = bytearray(data + other if kind == "after" else other + data)
    return bytes(data)


MEDIA = damaged(PICTURES + SOUNDS)
NUMBERS = [
    "0",
    "-1",
    "16",
    "1e999",
    "nan",
    "-inf",
    "9" * 5000,
    "1_000",
    "\u0661",
    " 16 ",
    "0x10",
    "16x16",
    "1.5",
    "",
]
TEXTS = st.one_of(
    st.sampled_from(
        [*NUMBERS, "a cat", "null", "true", "\0", "../../etc/passwd", "x" * 501, "images", "editor", "png"]
    ),
    st.text(max_size=40),
)
BYTES = st.one_of(TEXTS.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=40), MEDIA)
NAMES = st.one_of(st.sampled_from(FIELDS).map(str.encode), st.binary(max_size=12))
CHARSETS = ["", "utf-8", "utf-16", "utf-7", "unicode_escape", "hex", "zip", "idna", "no-such"]
FILENAMES = [b"", b"", b'; filename="a.png"', b'; filename="\0/../x"', b"; filename*=utf-8''%ff"]
PART_HEADERS = [
    *(
        b"",
        b"",
        b"Content-Type: image/png\r\n",
        b"Content-Type: \xff\r\n",
        b"Content-Transfer-Encoding: base64\r\n",
    ),
    *(b"X\r\n", b"A: " + b"b" * 9000 + b"\r\n"),
]


@st.composite
def forms(draw):
    """A path, a body that nearly is a form, and its content type."""
    path = draw(st.sampled_from(sorted(FORMS)))
    boundary = draw(st.sampled_from([b"B", b"B", b"B", b"-", b"x" * 70]))
    parts = [(b"prompt", b"", b"a cat")] if draw(st.booleans()) else []
    if draw(st.booleans()):
        parts.append((FORMS[path].encode(), b'; filename="a.png"', draw(MEDIA)))
    parts += draw(st.lists(st.tuples(NAMES, st.sampled_from(FILENAMES), BYTES), max_size=4))
    body = b""
    for name, filename, data in parts:
        more = draw(st.sampled_from(PART_HEADERS))
        head = b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n%b\r\n' % (boundary, name, filename, more)
        body += head + data + b"\r\n"
    body += draw(st.sampled_from([b"--" + boundary + b"--\r\n", b"--" + boundary, b""]))
    if draw(st.integers(0, 5)) == 0:
        body = body[: draw(st.integers(0, len(body)))]
    told = draw(st.sampled_from([boundary, boundary, boundary, b"other", b"", b'"', b"\xff"]))
    kind = b"multipart/form-data; boundary=" + told + b"; charset=" + draw(st.sampled_from(CHARSETS)).encode()
    others = [b"multipart/form-data", b"application/x-www-form-urlencoded"]
    return path, body, draw(st.sampled_from([kind] * 6 + others))


@given(form=forms())
@fuzzed
def test_any_form_is_answered(client, form):
    path, body, kind = form
    answered(client, path, body, {b"Content-Type": kind})


@given(path=st.sampled_from(sorted(FORMS)), data=MEDIA)
@fuzzed
def test_any_upload_is_drawn_from_or_refused_by_its_name(client, path, data):
    form = {"prompt": "a cat", "model": "editor" if "images" in path else "videos"}
    request = client.build_request("POST", path, data=form, files={FORMS[path]: data})
    done = answered(client, path, request.read(), request.headers)
    if done.status_code != 200 and done.json()["error"]["code"] != "body_too_large":
        assert done.json()["error"]["param"] == FORMS[path]


INSERTED = ["=", "===", "-_", "\n", "%3D", "\u00e9", "\ud800", "\0", ";base64,"]
BEFORE = [
    *("", "data:image/png;base64,", "data:;base64,", "data:text/html,", "DATA:audio/wav;base64,", "http://["),
    *("file:///", "data:audio/wav;charset=x;base64,", "data:" + "a" * 300 + ";base64,"),
]


@st.composite
def written(draw):
    """A file in base64, or nearly."""
    text = base64.b64encode(draw(MEDIA)).decode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, min(len(text), 100)))
        text = text[:at] + draw(st.sampled_from(INSERTED)) + text[at:]
    return draw(st.sampled_from(BEFORE)) + text[: draw(st.sampled_from([None, None, -1, -2, -3, 5]))]


@given(text=written(), kind=st.sampled_from(["image_url", "audio_url", "input_audio"]))
@fuzzed
def test_any_base64_in_a_chat_is_taken_or_refused_by_its_name(client, text, kind):
    field = "data" if kind == "input_audio" else "url"
    body = {"messages": [{"role": "user", "content": [{"type": kind, kind: {field: text}}]}]}
    done = answered(client, "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    if done.status_code != 200 and done.json()["error"]["code"] != "body_too_large":
        assert done.json()["error"]["param"].startswith("messages.0.content.0")


MORE = ["messages", "stop", "modalities", "audio", "stream", "max_tokens", "voice"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just("\ud800"), st.just(10**4000)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS + MORE) | TEXTS, VALUES, max_size=3)


@given(path=st.sampled_from(sorted(JSON_FIELDS)), changes=CHANGES, is_cut=st.booleans())
@fuzzed
def test_any_json_is_answered(client, path, changes, is_cut):
    body = json.dumps(JSON_FIELDS[path] | changes)
    answered(client, path, body[: -1 if is_cut else None], {"Content-Type": "application/json"})


HEADERS = ["Host", "Origin", "Authorization", "Content-Type", "X-Request-Id", "Idempotency-Key", "Accept"]
LATIN_1 = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)


@given(name=st.sampled_from(HEADERS), value=st.sampled_from(["http://[", "[", "-1", "9" * 400]) | LATIN_1)
@fuzzed
def test_any_header_is_answered(client, name, value):
    body = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n--B--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=B", name: value.strip().encode("latin-1")}
    answered(client, "/v1/videos", body, headers)
