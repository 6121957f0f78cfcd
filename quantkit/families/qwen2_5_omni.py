"""Qwen2.5-Omni: a thinker that reads text, images, audio and video and writes text, a talker that speaks it.

Quantized is the thinker's language model. Its towers, the talker and token2wav stay as they are: 4 bit there is
heard at once and saves little.
"""

from __future__ import annotations

from quantkit.families.omni import THINKER_ALIASES, THINKER_BLOCKS, THINKER_SECTION, OmniFamily
from quantkit.recipe.schema import Sampling

QWEN2_5_OMNI = OmniFamily(
    name="qwen2.5-omni",
    task="chat",
    blocks={"model": (THINKER_BLOCKS,)},
    sampling=Sampling(),
    aliases=THINKER_ALIASES,
    config_sections=(THINKER_SECTION,),
)
