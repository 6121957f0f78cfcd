"""What all families have in common, whatever their models are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.recipe.schema import Sampling, Task


@dataclass(frozen=True)
class Family:
    """Name, task and sampling of a kind of model.

    Attributes:
        name: As recipes spell it.
        task: What its models do.
        sampling: Defaults of every sampling key that the models take. A key that is None here is not a parameter
            of the family.
    """

    name: str
    task: Task
    sampling: Sampling

    def sampling_for(self, *layers: Sampling) -> Sampling:
        """Return the family's sampling defaults, overlaid by each of the given in turn.

        Raises:
            RecipeError: If one of them names a key that the family does not take.
        """
        result = self.sampling
        for layer in layers:
            unknown = layer.given().keys() - self.sampling.given().keys()
            if unknown:
                raise RecipeError(
                    f"sampling: {self.name} takes no {', '.join(sorted(unknown))} "
                    f"(it takes {', '.join(self.sampling.given())})"
                )
            result = layer.over(result)
        return result

    def call_kwargs(self, sampling: Sampling) -> dict[str, Any]:
        """Return the keyword arguments of a call, without the prompt and what a comparison adds."""
        return dict(sampling.given())
