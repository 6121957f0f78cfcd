"""GLM-Image: an autoregressive model draws coarse image tokens, a diffusion transformer makes the image of them.

The transformer is quantized, as published. The autoregressive stage ``vision_language_encoder`` is an option: it is
half of the model, but a changed token changes the whole picture.
"""

from __future__ import annotations

from quantkit.families.base import DiffusionFamily
from quantkit.recipe.schema import Sampling

GLM_IMAGE = DiffusionFamily(
    name="glm-image",
    task="t2i",
    blocks={
        "transformer": ("transformer_blocks",),
        "vision_language_encoder": ("model.language_model.layers",),
    },
    sampling=Sampling(
        height=1024,
        width=1024,
        num_inference_steps=50,
        guidance_scale=1.5,
        max_sequence_length=2048,
    ),
    optional=("vision_language_encoder",),
    kept={
        "glyph_projector": "its input features (1472 as published) divide by no group size above 64",
        "prior_projector": "projects the coarse image tokens once for all blocks",
        "time_condition_embed": "embeds time and size once for all blocks",
        "model.visual": "the vision tower",
        "lm_head": "the head",
    },
    block_outputs={"GlmImageTransformerBlock": ("hidden_states", "encoder_hidden_states")},
)
