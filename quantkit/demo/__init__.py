"""The embedded default: a small trained FLUX pipeline that draws captioned shapes.

Only :func:`path` lives at this level, so that importing the package stays light. The parts:

- ``scenes``, ``captions``, ``drawing``: what can be asked for, in words and in pixels;
- ``scorer``: which attributes of a caption's scene an image shows;
- ``architecture``, ``tokenizers``, ``dataset``, ``train``: how the weights were made;
- ``evaluate``: the attribute table of held-out captions; ``prompts``: the same captions as prompt files.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the directory of the embedded BF16 pipeline.

    It is an ordinary diffusers ``FluxPipeline``; ``README.md`` in it states its scores and how to sample from it.
    """
    return Path(__file__).resolve().parent / "pipeline"
