"""An exact scorer: which attributes of a scene does an image show?

Objects are connected regions that differ from the border's colour. A region's shape is the one whose own drawing,
with the region's area and centroid, covers it best. Nothing here is learned, and every threshold lies far from what
the generator draws (the tests hold the two against each other).
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from quantkit.demo.drawing import FloatArray, Placement, coverage, moments
from quantkit.demo.scenes import BACKGROUND_COLOURS, CANVAS_PX, OBJECT_COLOURS, SHAPES, Scene, SceneObject
from quantkit.errors import OutputError

ATTRIBUTES = ("colour", "shape", "size", "position", "relation", "count", "background")

_BORDER_PX = 2
_UNIFORM_SHARE = 0.9
_FOREGROUND_DISTANCE = 45.0
_COLOUR_DISTANCE = 75.0
_MIN_AREA_PX = 24
_MIN_OVERLAP = 0.6
_LARGE_FROM_PX = 20.5
_OUTER_THIRD_PX = 24.0
_RELATION_MIN_PX = 8.0
_MAX_CANDIDATES = 6


@dataclass(frozen=True)
class DetectedObject:
    """One object seen in an image.

    Attributes:
        colour: the nearest palette colour, or None when none is near.
        shape: the best fitting shape, or None when none fits.
        size_px: the longer side of its box.
        x_px, y_px: the centre of its box.
    """

    colour: str | None
    shape: str | None
    size_px: float
    x_px: float
    y_px: float


@dataclass(frozen=True)
class Detection:
    """What an image shows: the background's colour (None when not uniform or unknown) and the objects."""

    background: str | None
    objects: tuple[DetectedObject, ...]


def _nearest_colour(rgb: FloatArray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.asarray(colour))) for name, colour in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _COLOUR_DISTANCE else None


def _fit_shape(alpha: FloatArray) -> str | None:
    area = float(alpha.sum())
    rows, columns = np.indices(alpha.shape)
    x_px = float((alpha * (columns + 0.5)).sum()) / area
    y_px = float((alpha * (rows + 0.5)).sum()) / area
    overlaps = {}
    for shape in SHAPES:
        area_share, centroid_drop = moments(shape)
        size_px = (area / area_share) ** 0.5
        drawn = coverage(shape, Placement(x_px, y_px - centroid_drop * size_px, size_px))
        overlaps[shape] = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _MIN_OVERLAP else None


def _measure(pixels: FloatArray, background: FloatArray, region: npt.NDArray[np.bool_]) -> DetectedObject:
    contrast = np.linalg.norm(pixels - background, axis=-1)
    core = region & (contrast >= np.median(contrast[region]))
    colour = np.median(pixels[core], axis=0)
    axis = colour - background
    alpha = np.clip((pixels - background) @ axis / float(axis @ axis), 0, 1)
    alpha[~ndimage.binary_dilation(region)] = 0
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=side)) for side in (1, 0))
    width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return DetectedObject(
        colour=_nearest_colour(colour, OBJECT_COLOURS),
        shape=_fit_shape(alpha),
        size_px=float(max(width, height)),
        x_px=float(columns[0] + columns[-1] + 1) / 2,
        y_px=float(rows[0] + rows[-1] + 1) / 2,
    )


def detect(image: npt.NDArray[np.uint8]) -> Detection:
    """Find the background and the objects of an image.

    Args:
        image: RGB, uint8, of shape (64, 64, 3).

    Raises:
        OutputError: the image has another shape or type.
    """
    if image.shape != (CANVAS_PX, CANVAS_PX, 3) or image.dtype != np.uint8:
        raise OutputError(
            f"the scorer reads uint8 RGB images of shape ({CANVAS_PX}, {CANVAS_PX}, 3), "
            f"not {image.dtype} of shape {image.shape}: sample with height={CANVAS_PX} and width={CANVAS_PX}"
        )
    pixels = image.astype(np.float64)
    is_border = np.ones(image.shape[:2], dtype=bool)
    is_border[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    border = pixels[is_border]
    background: FloatArray = np.median(border, axis=0)
    uniform = np.linalg.norm(border - background, axis=-1) <= _FOREGROUND_DISTANCE
    name = _nearest_colour(background, BACKGROUND_COLOURS) if uniform.mean() >= _UNIFORM_SHARE else None
    labels, count = ndimage.label(np.linalg.norm(pixels - background, axis=-1) > _FOREGROUND_DISTANCE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    regions = [labels == index for index in range(1, count + 1) if areas[index] >= _MIN_AREA_PX]
    return Detection(name, tuple(_measure(pixels, background, region) for region in regions))


def _size_name(found: DetectedObject) -> str:
    return "large" if found.size_px >= _LARGE_FROM_PX else "small"


def _position_name(found: DetectedObject) -> str:
    row, column = (
        "near" if centre < _OUTER_THIRD_PX else "far" if centre > CANVAS_PX - _OUTER_THIRD_PX else "middle"
        for centre in (found.y_px, found.x_px)
    )
    words = [{"near": "top", "far": "bottom"}.get(row, ""), {"near": "left", "far": "right"}.get(column, "")]
    return " ".join(word for word in words if word) or "center"


def _stands_in(relation: str, first: DetectedObject, second: DetectedObject) -> bool:
    dx, dy = second.x_px - first.x_px, second.y_px - first.y_px
    towards = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return towards >= _RELATION_MIN_PX and towards > across


def _assign_pair(wanted: tuple[SceneObject, ...], found: tuple[DetectedObject, ...]) -> tuple[DetectedObject, ...]:
    """Choose the two detected objects that agree best with the two wanted ones, colour first."""

    def agreement(chosen: tuple[DetectedObject, ...]) -> int:
        return sum(
            4 * (seen.colour == item.colour) + 2 * (seen.shape == item.shape) + (_size_name(seen) == item.size)
            for item, seen in zip(wanted, chosen, strict=True)
        )

    largest = sorted(found, key=lambda seen: -seen.size_px)[:_MAX_CANDIDATES]
    return max(permutations(largest, len(wanted)), key=agreement)


def score(image: npt.NDArray[np.uint8], scene: Scene) -> dict[str, bool]:
    """Tell for each attribute that the scene's caption names whether the image shows it.

    Args:
        image: RGB, uint8, of shape (64, 64, 3).
        scene: what the caption asks for.

    Returns:
        Verdicts by attribute (a subset of ``ATTRIBUTES``): ``size`` only where the caption names it, ``position``
        only for a single object, ``relation`` only for a pair. Colour, shape and size hold when they hold for every
        object; with no object to look at they do not.

    Raises:
        OutputError: the image has another shape or type.
    """
    seen = detect(image)
    verdicts = {
        "count": len(seen.objects) == len(scene.objects),
        "background": seen.background == scene.background,
    }
    if scene.kind == "pair":
        complete = len(seen.objects) >= len(scene.objects)
        chosen = _assign_pair(scene.objects, seen.objects) if complete else ()
        matches = list(zip(scene.objects, chosen, strict=False))
        verdicts["relation"] = complete and _stands_in(str(scene.relation), *chosen)
    else:
        matches = [(scene.objects[0], found) for found in seen.objects]
    verdicts["colour"] = bool(matches) and all(item.colour == found.colour for item, found in matches)
    verdicts["shape"] = bool(matches) and all(item.shape == found.shape for item, found in matches)
    if scene.objects[0].size is not None:
        verdicts["size"] = bool(matches) and all(item.size == _size_name(found) for item, found in matches)
    if scene.position is not None:
        verdicts["position"] = bool(matches) and all(
            _position_name(found) == scene.position for _, found in matches
        )
    return verdicts
