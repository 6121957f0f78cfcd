"""The errors a user of quantkit can meet, each with one clear line.

::

    QuantkitError
    ├── RecipeError            a recipe, prompt file or option cannot be used as written
    ├── UnsupportedModelError  the model is of no family that quantkit knows, or of another task
    ├── MissingExtraError      an optional dependency is not installed; the message names the pip line
    ├── CheckpointError        a model folder is incomplete, damaged or contradicts itself
    ├── QuantizationError      quantizing failed, or its result does not match the plan
    ├── OutputError            the output cannot be written, or would replace something of the user's
    └── ServabilityError       a serving engine could not load the checkpoint

The command line turns each of them into one line and exit code 2; the library never exits.
"""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of every error that quantkit raises on purpose."""


class RecipeError(QuantkitError):
    """A recipe, a prompt file or an option cannot be used; holds every problem found at once.

    Attributes:
        problems: One ``file:line: key: reason`` (or plain reason) for each problem.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnsupportedModelError(QuantkitError):
    """The model belongs to no family quantkit knows, or the family cannot do the task."""


class MissingExtraError(QuantkitError):
    """An optional dependency is missing.

    Args:
        package: What could not be imported.
        extra: The extra of quantkit that brings it, e.g. ``"quantize"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'quantkit[{extra}]'")
        self.package = package
        self.extra = extra


class CheckpointError(QuantkitError):
    """A model folder is incomplete, damaged or contradicts itself."""


class QuantizationError(QuantkitError):
    """Quantizing failed, or its result does not match the plan."""


class OutputError(QuantkitError):
    """The output cannot be written, or would replace something that the user has."""


class ServabilityError(QuantkitError):
    """A serving engine could not load the checkpoint."""
