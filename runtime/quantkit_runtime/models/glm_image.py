"""What GLM-Image's pipeline needs to edit pictures with the library versions at hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def split_pictures(encoder: Any) -> None:
    """Let an encoder take the features of several pictures joined.

    The pipeline of diffusers 0.42 joins them, (pictures * channels, height, width); the model of transformers 5.23
    wants a sequence with those of each.

    Args:
        encoder: The pipeline's ``vision_language_encoder``, changed in place.
    """
    tokens_of = encoder.get_image_tokens

    def get_image_tokens(features: Any, grids: Any = None) -> Any:
        if isinstance(features, Tensor) and features.ndim == 3:
            features = features.chunk(len(grids))
        return tokens_of(features, grids)

    encoder.get_image_tokens = get_image_tokens
