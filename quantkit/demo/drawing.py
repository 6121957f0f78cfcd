"""Drawing of scenes: 64 x 64 RGB images with anti-aliased shapes.

Margins keep two objects at least two pixels apart, and an object two pixels away from the border, so that the
scorer can take the border for the background and each connected region for one object.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from quantkit.demo.scenes import BACKGROUND_COLOURS, CANVAS_PX, OBJECT_COLOURS, POSITIONS, Scene, SceneObject

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SIZE_RANGES_PX: dict[str | None, tuple[float, float]] = {
    "small": (14.0, 17.0),
    "large": (24.0, 26.0),
    None: (15.0, 19.0),
}
_SUPERSAMPLING = 4
_NEAR_PX, _FAR_PX = 16.5, 47.5  # centre lines of the two halves that pairs and groups use
_STAR_INNER_RADIUS = 0.45
_RING_INNER_RADIUS = 0.55
_CROSS_HALF_WIDTH = 0.36


@dataclass(frozen=True)
class Placement:
    """Where an object lies: the centre of its box and the length of the box's side, in pixels."""

    x_px: float
    y_px: float
    size_px: float


def _inside(shape: str, u: FloatArray, v: FloatArray) -> BoolArray:
    """Tell which points lie inside a shape that fills the box from -1 to 1 (v points down)."""
    in_box = np.maximum(np.abs(u), np.abs(v)) <= 1
    if shape == "square":
        return in_box
    if shape == "triangle":
        return in_box & (np.abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return in_box & (np.minimum(np.abs(u), np.abs(v)) <= _CROSS_HALF_WIDTH)
    radius = np.hypot(u, v)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= _RING_INNER_RADIUS)
    # A star: fold the angle into the half sector between a tip and its neighbouring notch, then one line decides.
    half_sector = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + half_sector) % (2 * half_sector) - half_sector)
    notch_x, notch_y = _STAR_INNER_RADIUS * np.cos(half_sector), _STAR_INNER_RADIUS * np.sin(half_sector)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    in_star: BoolArray = (notch_x - 1) * y - notch_y * (x - 1) >= 0
    return in_star


def coverage(shape: str, placement: Placement) -> FloatArray:
    """Return how much of each pixel a shape covers.

    Args:
        shape: one of ``SHAPES``.
        placement: its box; parts outside the canvas are cut off.

    Returns:
        An array of shape (64, 64) with values from 0 to 1.
    """
    half = placement.size_px / 2
    left, top = (int(max(0, np.floor(centre - half))) for centre in (placement.x_px, placement.y_px))
    right, bottom = (int(min(CANVAS_PX, np.ceil(centre + half))) for centre in (placement.x_px, placement.y_px))
    result = np.zeros((CANVAS_PX, CANVAS_PX))
    if right <= left or bottom <= top:
        return result
    offsets = (np.arange(_SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    x = (np.arange(left, right)[:, None] + offsets).ravel()
    y = (np.arange(top, bottom)[:, None] + offsets).ravel()
    u, v = np.meshgrid((x - placement.x_px) / half, (y - placement.y_px) / half)
    samples = _inside(shape, u, v).reshape(bottom - top, _SUPERSAMPLING, right - left, _SUPERSAMPLING)
    result[top:bottom, left:right] = samples.mean(axis=(1, 3))
    return result


@lru_cache
def moments(shape: str) -> tuple[float, float]:
    """Return a shape's area as a share of its box, and how far below the box's centre its centroid lies.

    The second number is in units of the box's side.
    """
    axis = (np.arange(512) + 0.5) / 256 - 1
    u, v = np.meshgrid(axis, axis)
    inside = _inside(shape, u, v)
    return float(inside.mean()), float(v[inside].mean() / 2)


def _size(item: SceneObject, rng: np.random.Generator) -> float:
    return float(rng.uniform(*SIZE_RANGES_PX[item.size]))


def _along_axis(third: int, size_px: float, rng: np.random.Generator) -> float:
    if third == 1:
        return float(CANVAS_PX / 2 + rng.uniform(-2, 2))
    from_edge = size_px / 2 + 3 + float(rng.uniform(0, 2))
    return from_edge if third == 0 else CANVAS_PX - from_edge


def place(scene: Scene, rng: np.random.Generator) -> list[Placement]:
    """Choose where each object of a scene lies, within what its position, relation and sizes allow."""
    sizes_px = [_size(item, rng) for item in scene.objects]
    if scene.position is not None:
        row, column = divmod(POSITIONS.index(scene.position), 3)
        (size_px,) = sizes_px
        return [Placement(_along_axis(column, size_px, rng), _along_axis(row, size_px, rng), size_px)]
    if scene.relation is not None:
        lines = (_NEAR_PX, _FAR_PX) if scene.relation in ("left of", "above") else (_FAR_PX, _NEAR_PX)
        placements = []
        for line, size_px in zip(lines, sizes_px, strict=True):
            along = line + float(rng.uniform(-1, 1))
            across = CANVAS_PX / 2 + float(rng.uniform(-6, 6))
            horizontal = scene.relation in ("left of", "right of")
            x_px, y_px = (along, across) if horizontal else (across, along)
            placements.append(Placement(x_px, y_px, size_px))
        return placements
    quadrants = rng.permutation(4)[: len(scene.objects)]
    centres = [((_NEAR_PX, _FAR_PX)[int(q) % 2], (_NEAR_PX, _FAR_PX)[int(q) // 2]) for q in quadrants]
    return [
        Placement(x + float(rng.uniform(-4, 4)), y + float(rng.uniform(-4, 4)), size_px)
        for (x, y), size_px in zip(centres, sizes_px, strict=True)
    ]


def draw(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a scene, with placements from ``rng``.

    Returns:
        An RGB image of shape (64, 64, 3).
    """
    image = np.empty((CANVAS_PX, CANVAS_PX, 3))
    image[:] = BACKGROUND_COLOURS[scene.background]
    for item, placement in zip(scene.objects, place(scene, rng), strict=True):
        alpha = coverage(item.shape, placement)[..., None]
        image = image * (1 - alpha) + alpha * np.asarray(OBJECT_COLOURS[item.colour], dtype=np.float64)
    return np.round(image).astype(np.uint8)
