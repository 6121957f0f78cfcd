"""One served model: its name, its engine, its queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit_runtime.server.errors import ApiError, bad_request
from quantkit_runtime.server.protocol import Kind, ModelInfo
from quantkit_runtime.server.scheduler import Scheduler
from quantkit_runtime.server.supervisor import EngineGroup


@dataclass(frozen=True)
class Deployment:
    """A model as requests find it.

    Attributes:
        name: As in the field ``model``.
        engine: Its processes.
        scheduler: Its queue.
    """

    name: str
    engine: EngineGroup
    scheduler: Scheduler

    @property
    def info(self) -> ModelInfo:
        """What the model can do.

        Raises:
            ApiError: It has not been loaded yet.
        """
        if self.engine.info is None:
            raise ApiError(
                503,
                f"model {self.name} is not ready: {self.engine.reason}",
                code="model_not_ready",
                headers={"Retry-After": "5"},
            )
        return self.engine.info

    def default(self, name: str) -> Any:
        """Return the value of a field that a request leaves out; None where there is none."""
        return self.info.defaults.get(name)


@dataclass(frozen=True)
class Deployments:
    """All served models, the default one first."""

    by_name: dict[str, Deployment]

    def find(self, name: str | None, kind: Kind, does: str) -> Deployment:
        """Return the model that a request names, or else the first.

        Args:
            name: As the request gives it.
            kind: Of the request.
            does: What such a model does, for the error.

        Raises:
            ApiError: It is unknown, not loaded yet, or of another kind.
        """
        if name is None:
            found = next((d for d in self.by_name.values() if kind in d.info.kinds), None)
            found = found or next(iter(self.by_name.values()))
        elif (known := self.by_name.get(name)) is not None:
            found = known
        else:
            names = ", ".join(self.by_name)
            raise ApiError(
                404, f"model: {name!r} is not served; use {names}", param="model", code="model_not_found"
            )
        if kind not in found.info.kinds:
            raise bad_request(f"model: {found.name} does not {does}", "model", "unsupported_model")
        return found
