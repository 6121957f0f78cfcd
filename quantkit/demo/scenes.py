"""Scenes of coloured shapes: what the demo model can be asked to draw.

A scene is a short list of discrete attributes. Where exactly each object lies is drawn at random within the
limits that the attributes leave (see ``drawing``). Scenes are divided by a hash of their attributes into a
training part and a held-out part, so no held-out scene is ever seen in training in whatever wording.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["single", "pair", "group"]
Split = Literal["train", "held-out"]

CANVAS_PX = 64

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (240, 125, 25),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "cyan": (60, 200, 220),
    "blue": (45, 80, 210),
    "purple": (140, 60, 180),
    "pink": (250, 150, 200),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "brown": (110, 70, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
GROUP_COUNTS = (2, 3, 4)

_MIRRORED = {"right of": "left of", "below": "above"}
_KIND_SHARES: dict[Kind, float] = {"single": 0.40, "pair": 0.35, "group": 0.25}
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        colour: a key of ``OBJECT_COLOURS``.
        shape: one of ``SHAPES``.
        size: one of ``SIZES``, or None where the caption leaves it open (groups).
    """

    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for.

    Attributes:
        kind: ``single`` (one object at a named position), ``pair`` (two objects of different colours in a named
            relation) or ``group`` (two to four equal objects).
        objects: the objects; in a pair the first one stands in ``relation`` to the second one.
        background: a key of ``BACKGROUND_COLOURS``.
        position: one of ``POSITIONS`` for a single object, else None.
        relation: one of ``RELATIONS`` for a pair, else None.
    """

    kind: Kind
    objects: tuple[SceneObject, ...]
    background: str
    position: str | None = None
    relation: str | None = None

    def key(self) -> str:
        """Return a canonical text of the attributes, equal for scenes that ask for the same picture.

        "A left of B" and "B right of A" have one key.
        """
        objects, relation = self.objects, self.relation
        if relation in _MIRRORED:
            objects, relation = objects[::-1], _MIRRORED[relation]
        parts = [f"{item.size} {item.colour} {item.shape}" for item in objects]
        return "|".join([self.kind, *parts, str(self.position), str(relation), self.background])

    def is_held_out(self) -> bool:
        """Tell whether the scene belongs to the held-out split (one in ten, by a hash of :meth:`key`)."""
        digest = hashlib.sha256(self.key().encode()).digest()
        return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene of either split from ``rng``."""
    colours, backgrounds = tuple(OBJECT_COLOURS), tuple(BACKGROUND_COLOURS)
    background = _pick(rng, backgrounds)
    kinds = tuple(_KIND_SHARES)
    kind = kinds[int(rng.choice(len(kinds), p=list(_KIND_SHARES.values())))]
    if kind == "single":
        item = SceneObject(_pick(rng, colours), _pick(rng, SHAPES), _pick(rng, SIZES))
        return Scene(kind, (item,), background, position=_pick(rng, POSITIONS))
    if kind == "pair":
        first, second = rng.permutation(len(colours))[:2]
        pair = tuple(
            SceneObject(colours[int(index)], _pick(rng, SHAPES), _pick(rng, SIZES)) for index in (first, second)
        )
        return Scene(kind, pair, background, relation=_pick(rng, RELATIONS))
    item = SceneObject(_pick(rng, colours), _pick(rng, SHAPES), None)
    return Scene(kind, (item,) * int(rng.choice(GROUP_COUNTS)), background)


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """Yield random scenes of one split without end, the same ones for the same seed."""
    rng = np.random.default_rng([seed, int(split == "held-out")])
    while True:
        scene = random_scene(rng)
        if scene.is_held_out() == (split == "held-out"):
            yield scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return ``count`` different held-out scenes, the same ones for the same arguments.

    A longer list begins with the shorter one of the same seed.
    """
    found: dict[str, Scene] = {}
    for scene in scenes("held-out", seed):
        found.setdefault(scene.key(), scene)
        if len(found) >= count:
            break
    return list(found.values())[:count]
