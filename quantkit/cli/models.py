"""Turning what a user types for a model into a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.cli.console import errors
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError

if TYPE_CHECKING:
    from quantkit.checkpoint import ModelFolder
    from quantkit.recipe import LoadedRecipe

_DEMO_RECIPE = "demo-flux"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(text: str, revision: str | None = None) -> Path:
    """Return the folder of a model given as ``demo``, as a path or as a hub id.

    Args:
        text: What the user gave.
        revision: Commit, tag or branch, for hub ids.

    Raises:
        CheckpointError: If it is no folder and cannot be downloaded.
        MissingExtraError: If a download needs diffusers and it is not installed.
    """
    if text == "demo":
        import quantkit.demo

        return quantkit.demo.path()
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text}: is a file; give the root folder of a model")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such folder")
    return _download(text, revision)


def resolve_for_plan(text: str, revision: str | None = None) -> Path | ModelFolder:
    """Return what a plan needs of a model, see `resolve_model`: weights only if they are here already.

    Returns:
        The folder of a local model or of a complete download; for another hub id whose configuration comes with
        quantkit, the published model without its weights.
    """
    if not _HUB_ID.fullmatch(text) or Path(text).exists():
        return resolve_model(text, revision)
    from quantkit.families.published import list_published, open_published

    if text not in list_published():
        return resolve_model(text, revision)
    return _find_download(text, revision) or open_published(text)


def resolve_recorded(model_id: str, revision: str | None, manifest: Path) -> Path:
    """Return the folder of the model that a checkpoint was made from, given as its manifest records it.

    Of a local model the manifest holds the folder's name alone. Looked for from here that may be any folder,
    even the checkpoint itself, so it is not looked for.

    Raises:
        RecipeError: If what is recorded may be the name of a local folder.
        CheckpointError: See `resolve_model`.
    """
    published = _HUB_ID.fullmatch(model_id) and not Path(model_id).exists()
    if model_id == "demo" or published or Path(model_id).is_absolute():
        return resolve_model(model_id, revision)
    raise RecipeError(
        f"--reference: {manifest} says that the candidate was made from '{model_id}', which may be any folder of "
        "that name; give the model to compare with"
    )


def recipe_for(text: str, folder: Path, given: str | None) -> LoadedRecipe | None:
    """Return the recipe that says how a model is sampled and judged: the one given, the demo's, or its own.

    Args:
        text: What the user gave for the model.
        folder: See `resolve_model`.
        given: Recipe by path or by name; None if the user gave none.

    Returns:
        None for a model that was not made with a recipe.

    Raises:
        RecipeError: If the recipe is not found or not valid.
    """
    from quantkit.recipe import find_recipe, load_recipe, recipe_of

    if given is None and text != "demo":
        return recipe_of(folder)
    return load_recipe(find_recipe(given or _DEMO_RECIPE))


def sampling_recipe(text: str, folder: Path, given: str | None) -> LoadedRecipe | None:
    """Return the recipe that says how a model is sampled, see `recipe_for`.

    A model runs without its manifest: one that cannot be read is told of, and the family's sampling is taken.
    """
    try:
        return recipe_for(text, folder, given)
    except RecipeError as error:
        if given is not None or text == "demo":
            raise
        errors.print(f"warning: {error}; sampled as its family is", markup=False, highlight=False, soft_wrap=True)
        return None


def _find_download(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model if all of its weights are in the local cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for index in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(hub_id, index, revision=revision)
        if isinstance(found, str) and _holds_weights(Path(found).parent):
            return Path(found).parent
    return None


def _holds_weights(folder: Path) -> bool:
    from quantkit.checkpoint import open_model

    try:
        components = open_model(folder).components.values()
        return all(part.tensors for part in components if (part.folder / "config.json").is_file())
    except CheckpointError:  # an interrupted download
        return False


def _download(hub_id: str, revision: str | None) -> Path:
    from quantkit_runtime.download import download
    from quantkit_runtime.errors import CheckpointFormatError, MissingDependencyError

    try:
        return download(hub_id, revision)
    except MissingDependencyError as error:
        raise MissingExtraError("diffusers", "quantize") from error
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error
