"""Generating one image, video or answer with any model that a family knows, on one rank or several."""

from quantkit.generate.request import Job, Request, prepare
from quantkit.generate.run import Made, run

__all__ = ["Job", "Made", "Request", "prepare", "run"]
