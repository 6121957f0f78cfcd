"""What the verbs that run a model have in common: sampling keys as options, and quiet libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import MissingExtraError, RecipeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from quantkit.recipe.schema import Sampling


def silence_libraries() -> None:
    """Keep the bars that diffusers and transformers draw while loading out of ours."""
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "eval") from error
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def sampling_of(given_as: str = "--", /, **options: Any) -> Sampling:
    """Return sampling keys that were given as options.

    Args:
        given_as: What stands before a key on the command line.
        options: The keys; None is not given.

    Raises:
        RecipeError: If a value is out of range; names the options.
    """
    from pydantic import ValidationError

    from quantkit.recipe.schema import Sampling

    try:
        return Sampling(**options)
    except ValidationError as error:
        raise RecipeError(*(_describe(problem, given_as) for problem in error.errors())) from error


def _describe(problem: ErrorDetails, given_as: str) -> str:
    key, message = str(problem["loc"][0]), problem["msg"]
    name = key.replace("_", "-") if given_as == "--" else key
    return f"{given_as}{name}: {message[0].lower()}{message[1:]}, not {problem['input']}"
