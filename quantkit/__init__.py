"""Quantize multimodal and diffusion models to 4 bit, prove how close they stay to BF16, serve them."""

__version__ = "0.1.0"
