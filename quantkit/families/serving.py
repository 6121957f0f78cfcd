"""What is known of how vLLM-Omni builds a family's models: names, shards, limits.

It renames and fuses Linears when it builds a model, and looks up `quantization_config` under the names it then has.
A layer that differs from the default scheme must be named there as it is called at run time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class VllmOmni:
    """How vLLM-Omni builds the models of a family.

    Attributes:
        renames: Regular expression and replacement, tried in order on the checkpoint's name of a Linear; the first
            that matches gives the name it has at run time. Linears that come to share one name are fused into one
            layer there.
        row_parallel: Regular expressions on checkpoint names of the Linears whose input features are split under
            tensor parallelism.
        member_keys: Whether keys of ``extra_config`` that name a member of a fused layer are found, too. vLLM's
            language models do so, its diffusion transformers do not promise it.
        unsupported: Why it cannot serve the family's quantized models at all; None if it can.
        unvalidated: What nobody has tried yet; None if the family is known to work.
    """

    renames: tuple[tuple[str, str], ...] = ()
    row_parallel: tuple[str, ...] = ()
    member_keys: bool = False
    unsupported: str | None = None
    unvalidated: str | None = None

    def name_of(self, layer: str) -> str:
        """Return the run-time name of a Linear, given the checkpoint's."""
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, layer)
            if count:
                return renamed
        return layer

    def splits_input(self, layer: str) -> bool:
        """Whether tensor parallelism splits a Linear's input features."""
        return any(re.search(pattern, layer) for pattern in self.row_parallel)


LANGUAGE_MODEL = VllmOmni(
    renames=(
        (r"\.experts\.\d+\.\w+$", ".experts"),
        (r"\.[qkv]_proj$", ".qkv_proj"),
        (r"\.(gate|up)_proj$", ".gate_up_proj"),
    ),
    row_parallel=(r"\.(o|down)_proj$",),
    member_keys=True,
)
"""Decoders in the manner of Qwen: fused q/k/v, fused gate and up, fused experts."""
