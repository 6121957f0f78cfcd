"""Which sizes a family's models draw, and which ones no command draws without being told twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.checkpoint import ModelFolder
from quantkit.errors import RecipeError
from quantkit.recipe.schema import Sampling


@dataclass(frozen=True)
class Grid:
    """The sizes that a model draws; its pipeline rounds others down, with a warning at most.

    Attributes:
        side: Height and width are multiples of it, pixels.
        frames: ``num_frames`` is one more than a multiple of it.
        most: Height and width at most, pixels; None is any.
    """

    side: int
    frames: int = 1
    most: int | None = None


def picture_grid(source: ModelFolder, *, latents: int = 2) -> Grid:
    """Return the sizes of a pipeline with diffusers' ``AutoencoderKL``.

    Args:
        source: The model.
        latents: Along a side, that belong together.
    """
    vae = source.components.get("vae")
    pixels = 8 if vae is None else 2 ** (len(vae.config.get("block_out_channels", (64,))) - 1)
    return Grid(latents * pixels)


def wan_grid(source: ModelFolder) -> Grid:
    """Return the sizes of a Wan pipeline, which takes multiples of 16 alone, then rounds to whole patches."""
    vae = source.components["vae"].config
    _, *patch = source.components["transformer"].config.get("patch_size", (1, 2, 2))
    pixels = vae.get("scale_factor_spatial", 8)
    return Grid(math.lcm(16, *(pixels * size for size in patch)), vae.get("scale_factor_temporal", 4))


def given_in(layers: Sequence[Sampling]) -> Callable[[str], str]:
    """Return how to name a sampling key: as an option, or as the recipe's where the last layer does not give it."""

    def name(key: str) -> str:
        if len(layers) > 1 and getattr(layers[-1], key) is None:
            return f"the recipe's {key}"
        return f"--{key.replace('_', '-')}"

    return name


def check_grid(grid: Grid, family: str, sampling: Sampling, named: Callable[[str], str]) -> None:
    """Refuse sizes between those that a model draws.

    Args:
        grid: What it draws.
        family: Its family's name.
        sampling: Complete.
        named: Returns how messages call a key.

    Raises:
        RecipeError: With the nearest sizes that work.
    """
    problems = []
    for key, step, first in (("height", grid.side, 0), ("width", grid.side, 0), ("num_frames", grid.frames, 1)):
        value = getattr(sampling, key)
        if value is not None and first == 0 and grid.most is not None and value > grid.most:
            problems.append(f"{named(key)}: is {value}, but this {family} model draws at most {grid.most}")
            continue
        if value is None or (value - first) % step == 0:
            continue
        below = value - (value - first) % step
        nearest = " or ".join(str(size) for size in (below, below + step) if size > 0)
        draws = f"multiples of {step}" if first == 0 else f"{first} more than multiples of {step}"
        problems.append(f"{named(key)}: is {value}, but this {family} model draws {draws}; use {nearest}")
    if problems:
        raise RecipeError(*problems)


def check_extent(sampling: Sampling, named: Callable[[str], str]) -> None:
    """Refuse more pixels or frames than the server draws by default: that many take hours, or all memory.

    Args:
        sampling: Complete.
        named: Returns how messages call a key.

    Raises:
        RecipeError: With the limit.
    """
    from quantkit_runtime.server.settings import Limits

    limits = Limits()
    height, width, frames = (getattr(sampling, key) or 1 for key in ("height", "width", "num_frames"))
    if height * width > limits.max_pixels:
        raise RecipeError(
            f"{named('width')}, {named('height')}: {width} x {height} are {height * width} pixels; more than "
            f"{limits.max_pixels} are drawn with --any-size only"
        )
    if frames > limits.max_frames:
        raise RecipeError(
            f"{named('num_frames')}: is {frames}; more than {limits.max_frames} are drawn with --any-size only"
        )
