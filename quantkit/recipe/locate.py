"""Where recipes and prompt files are found.

A recipe is looked for as the path given, then in the folders of ``$QUANTKIT_RECIPE_PATH``, then among those
that come with quantkit. A prompt file is looked for as the path given, beside the recipe that names it, then
among those that come with quantkit; what a checkpoint's manifest names, in the working directory not at all.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from quantkit.errors import RecipeError
from quantkit.recipe.load import MANIFEST

_PACKAGE = Path(__file__).resolve().parent.parent


def data_dir(kind: str) -> Path:
    """Return the folder of the data that comes with quantkit.

    Args:
        kind: ``recipes`` or ``prompts``.
    """
    installed = _PACKAGE / "_data" / kind
    if installed.is_dir():
        return installed
    return _PACKAGE.parent / {"recipes": "recipes", "prompts": "eval/prompts"}[kind]


def _search_path() -> list[Path]:
    own = [Path(entry) for entry in os.environ.get("QUANTKIT_RECIPE_PATH", "").split(os.pathsep) if entry]
    return [*own, data_dir("recipes")]


def list_recipes() -> dict[str, Path]:
    """Return every recipe that is found by name alone, by name; earlier folders hide later ones."""
    found: dict[str, Path] = {}
    for folder in _search_path():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by name, with or without ``.yaml``.

    Raises:
        RecipeError: If there is none.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    known = list_recipes()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    close = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known recipes: {', '.join(known) or 'none'}"
    raise RecipeError(f"{name}: no such recipe ({hint})")


def find_prompts(name: str, recipe: Path | None) -> Path:
    """Return the prompt file that a recipe or an option names.

    Args:
        name: Path, or the name of a file that comes with quantkit.
        recipe: The recipe or manifest that names it; None when an option does.

    Raises:
        RecipeError: If there is none.
    """
    given = Path(name).expanduser()
    recorded = recipe is not None and recipe.name == MANIFEST
    tried = [] if recipe is None else [recipe.parent / given]
    if not recorded:  # what a checkpoint names was found beside its recipe, elsewhere: a file here is another one
        tried.append(given)
    tried.append(data_dir("prompts") / name)
    for path in tried:
        if path.is_file():
            return path
    asked_by = "" if recipe is None else f"{recipe}: "
    mend = "; give it with --prompts, or with --recipe the recipe that lies beside it" if recorded else ""
    raise RecipeError(f"{asked_by}prompts: no file {name} (looked for {', '.join(map(str, tried))}){mend}")
