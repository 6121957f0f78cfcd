"""Draw the start pictures of ``prompts/i2v.jsonl``: ``python eval/draw_i2v.py``.

Simple scenes of 416 x 240 pixels (half of 832 x 480) in 96 colours, a few kilobytes each.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, OVERSAMPLING = 416, 240, 3
FOLDER = Path(__file__).parent / "prompts" / "i2v"


class _Canvas:
    """Draws in pixels of the final picture, smoothly."""

    def __init__(self, top: str, bottom: str) -> None:
        colours = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in (top, bottom)]
        gradient = Image.new("RGB", (1, HEIGHT))
        for y in range(HEIGHT):
            part = y / (HEIGHT - 1)
            gradient.putpixel((0, y), tuple(round(a + part * (b - a)) for a, b in zip(*colours, strict=True)))
        self.image = gradient.resize((WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING))
        self._draw = ImageDraw.Draw(self.image)

    def disc(self, x: int, y: int, radius: int, colour: str, squash: float = 1.0) -> None:
        box = (x - radius, y - radius * squash, x + radius, y + radius * squash)
        self._draw.ellipse([value * OVERSAMPLING for value in box], colour)

    def shape(self, colour: str, *points: tuple[int, int]) -> None:
        self._draw.polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], colour)

    def box(self, colour: str, left: int, top: int, right: int, bottom: int) -> None:
        self.shape(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def save(self, name: str) -> None:
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        small.quantize(96, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


def _sea() -> _Canvas:
    canvas = _Canvas("#3b4a8c", "#f2a65a")
    canvas.disc(300, 150, 34, "#ffd27a")
    canvas.box("#24507a", 0, 150, WIDTH, HEIGHT)
    for y, left in ((158, 276), (168, 286), (180, 270), (196, 290)):
        canvas.box("#e8b56b", left, y, left + 46, y + 3)
    canvas.shape("#5a3b2a", (90, 170), (170, 170), (152, 188), (106, 188))
    canvas.shape("#f7f3e8", (128, 90), (128, 166), (172, 166))
    canvas.shape("#e3dccb", (123, 104), (123, 166), (96, 166))
    return canvas


def _balloon() -> _Canvas:
    canvas = _Canvas("#7fb8e6", "#e6f2fa")
    canvas.disc(60, 200, 120, "#5d9b58", 0.6)
    canvas.disc(230, 220, 150, "#6fae62", 0.6)
    canvas.disc(390, 200, 110, "#4f8c50", 0.6)
    canvas.disc(250, 84, 52, "#d9463e")
    canvas.disc(250, 84, 30, "#f4d35e", 1.7)
    canvas.disc(250, 84, 12, "#d9463e", 4.2)
    canvas.shape("#7a5230", (238, 150), (262, 150), (259, 170), (241, 170))
    for x, y in ((80, 50), (104, 44), (126, 52), (350, 40), (372, 46)):
        canvas.disc(x, y, 20, "#ffffff", 0.7)
    return canvas


def _house() -> _Canvas:
    canvas = _Canvas("#1b2440", "#53648c")
    canvas.box("#e9eef5", 0, 190, WIDTH, HEIGHT)
    canvas.box("#6b4a3a", 150, 120, 270, 200)
    canvas.shape("#3d2b26", (135, 124), (210, 62), (285, 124))
    canvas.box("#5a4038", 240, 66, 258, 104)
    canvas.box("#ffd978", 172, 140, 202, 170)
    canvas.box("#3d2b26", 222, 146, 250, 200)
    for x in (40, 84, 330, 376):
        canvas.shape("#24483a", (x, 90), (x - 26, 196), (x + 26, 196))
        canvas.shape("#e9eef5", (x, 90), (x - 8, 122), (x + 8, 122))
    return canvas


def _fish() -> _Canvas:
    canvas = _Canvas("#7fd0e0", "#1f6f8f")
    canvas.box("#d8c48e", 0, 214, WIDTH, HEIGHT)
    for x in (40, 66, 350, 376):
        canvas.shape("#3f8f5a", (x - 6, 216), (x + 4, 120), (x + 10, 216))
    canvas.shape("#e8641f", (150, 120), (108, 92), (108, 148))
    canvas.disc(196, 120, 56, "#f58a3c", 0.6)
    canvas.shape("#e8641f", (180, 92), (214, 66), (222, 94))
    canvas.disc(230, 110, 8, "#ffffff")
    canvas.disc(232, 110, 4, "#1a1a1a")
    for x, y, radius in ((272, 84, 7), (286, 58, 9), (278, 30, 6)):
        canvas.disc(x, y, radius, "#d4f1f7")
    return canvas


def _ball() -> _Canvas:
    canvas = _Canvas("#e9dfcf", "#d8c9b2")
    canvas.box("#a9825a", 0, 196, WIDTH, HEIGHT)
    canvas.box("#7a4f2e", 40, 110, 260, 124)
    canvas.box("#6a4327", 56, 124, 70, 206)
    canvas.box("#6a4327", 230, 124, 244, 206)
    canvas.disc(226, 86, 24, "#c9302c")
    canvas.disc(218, 78, 7, "#f0a29f")
    canvas.box("#9cc3dd", 306, 30, 386, 104)
    canvas.box("#f4efe6", 343, 30, 349, 104)
    return canvas


def _train() -> _Canvas:
    canvas = _Canvas("#a8c8e4", "#dfeaf2")
    canvas.shape("#7c8a78", (0, 150), (110, 30), (240, 130), (330, 60), (WIDTH, 140), (WIDTH, HEIGHT), (0, HEIGHT))
    canvas.disc(250, 150, 44, "#2b2b30")
    canvas.box("#5f8a4a", 0, 168, WIDTH, HEIGHT)
    canvas.shape("#6d6258", (236, 168), (266, 168), (220, HEIGHT), (100, HEIGHT))
    canvas.shape("#c8c8cc", (240, 168), (243, 168), (126, HEIGHT), (118, HEIGHT))
    canvas.shape("#c8c8cc", (259, 168), (262, 168), (206, HEIGHT), (196, HEIGHT))
    canvas.box("#b5322b", 228, 124, 272, 170)
    canvas.box("#f2e9d8", 234, 130, 266, 146)
    canvas.disc(236, 160, 4, "#fff1a8")
    canvas.disc(264, 160, 4, "#fff1a8")
    return canvas


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for scene in (_sea, _balloon, _house, _fish, _ball, _train):
        scene().save(scene.__name__.removeprefix("_"))
