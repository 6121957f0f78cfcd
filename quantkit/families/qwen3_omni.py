"""Qwen3-Omni: as Qwen2.5-Omni, but the language models of thinker and talker are mixtures of experts.

Quantized are the thinker's attention and experts. Routers stay in 16 bit, and so do the towers, the talker with its
code predictor, and code2wav.
"""

from __future__ import annotations

from quantkit.families.omni import THINKER_ALIASES, THINKER_BLOCKS, THINKER_SECTION, OmniFamily
from quantkit.recipe.schema import Sampling

QWEN3_OMNI = OmniFamily(
    name="qwen3-omni",
    task="chat",
    blocks={"model": (THINKER_BLOCKS,)},
    sampling=Sampling(),
    aliases=THINKER_ALIASES,
    config_sections=(THINKER_SECTION,),
)
