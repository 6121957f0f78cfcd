"""Captions of scenes, in a short and a long wording."""

from typing import Literal

import numpy as np

from quantkit.demo.scenes import (
    BACKGROUND_COLOURS,
    GROUP_COUNTS,
    OBJECT_COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    held_out_scenes,
)

Wording = Literal["short", "long"]
WORDINGS: tuple[Wording, ...] = ("short", "long")
VARIANTS = 2  # phrasings of each kind and wording

_NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
_TEMPLATES: dict[tuple[str, Wording], tuple[str, str]] = {
    ("single", "short"): (
        "a {size} {colour} {shape} at the {position} on {background}",
        "{size} {colour} {shape}, {position}, {background} background",
    ),
    ("single", "long"): (
        (
            "A picture with a plain {background} background that shows one {size} {colour} {shape}, and it is "
            "placed at the {position} of the image."
        ),
        (
            "There is a single {colour} {shape} of {size} size at the {position} of this drawing, and everything "
            "behind it is {background}."
        ),
    ),
    ("pair", "short"): (
        "{first} {relation} {second} on {background}",
        "{first} {relation} {second}, {background} background",
    ),
    ("pair", "long"): (
        (
            "On a plain {background} background there are two objects: {first} and {second}; the first one is "
            "{relation} the second one."
        ),
        "This drawing shows {first} that is {relation} {second}, and everything behind them is {background}.",
    ),
    ("group", "short"): (
        "{count} {colour} {shapes} on {background}",
        "{count} {colour} {shapes}, {background} background",
    ),
    ("group", "long"): (
        (
            "The image shows exactly {count} objects, each of them a {colour} {shape}, in front of a plain "
            "{background} background."
        ),
        "There are {count} {colour} {shapes} in this drawing, and everything behind them is {background}.",
    ),
}


def _describe(item: SceneObject) -> str:
    return f"a {item.size} {item.colour} {item.shape}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def caption(scene: Scene, wording: Wording, variant: int = 0) -> str:
    """Say a scene in words.

    Args:
        scene: what to say.
        wording: ``short`` (a phrase) or ``long`` (a sentence).
        variant: which phrasing, from 0 to ``VARIANTS - 1``.
    """
    item = scene.objects[0]
    return _TEMPLATES[scene.kind, wording][variant].format(
        size=item.size,
        colour=item.colour,
        shape=item.shape,
        shapes=_plural(item.shape),
        position=scene.position,
        relation=scene.relation,
        background=scene.background,
        count=_NUMBER_WORDS.get(len(scene.objects), ""),
        first=_describe(item),
        second=_describe(scene.objects[-1]),
    )


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say a scene in a wording and phrasing drawn from ``rng``; one in four begins with a capital letter."""
    text = caption(scene, WORDINGS[int(rng.integers(len(WORDINGS)))], int(rng.integers(VARIANTS)))
    return text[0].upper() + text[1:] if rng.integers(4) == 0 else text


def held_out_captions(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return ``count`` held-out scenes, each with one caption; wordings and phrasings take turns."""
    pairs = []
    for index, scene in enumerate(held_out_scenes(count, seed)):
        turn = index % (len(WORDINGS) * VARIANTS)
        pairs.append((scene, caption(scene, WORDINGS[turn % len(WORDINGS)], turn // len(WORDINGS))))
    return pairs


def vocabulary() -> list[str]:
    """Return every word that captions are made of, sorted, in lower case and with a capital letter."""
    texts = [
        *OBJECT_COLOURS,
        *BACKGROUND_COLOURS,
        *SHAPES,
        *map(_plural, SHAPES),
        *SIZES,
        *POSITIONS,
        *RELATIONS,
        *(_NUMBER_WORDS[count] for count in GROUP_COUNTS),
    ]
    for templates in _TEMPLATES.values():
        texts.extend(templates)
    words = {word.strip(",.:;").lower() for text in texts for word in text.split() if "{" not in word}
    return sorted(words | {word.capitalize() for word in words})
