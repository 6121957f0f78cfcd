"""Tiny random models of the real architectures, saved as ordinary pipelines."""

from tiny_bagel import build_bagel

from tiny.flux import build_flux
from tiny.glm_image import build_glm_image
from tiny.ovis_image import build_ovis_image
from tiny.wan import build_wan_i2v, build_wan_t2v, build_wan_ti2v

__all__ = [
    "build_bagel",
    "build_flux",
    "build_glm_image",
    "build_ovis_image",
    "build_wan_i2v",
    "build_wan_t2v",
    "build_wan_ti2v",
]
