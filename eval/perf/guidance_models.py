"""The models of cfg_parallel.py: the embedded one from its files, or FLUX.1-dev at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guidance_ways import Settings, Variant

DEMO = Path(__file__).resolve().parents[2] / "quantkit" / "demo" / "pipeline"
PROMPTS = ("a large red circle at the center on white", "a small blue square at the top on black")


def load(folder: str, settings: Settings, way: Variant, device: Any, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline and what it is to draw, as arguments of its call."""
    shared = mesh["tensor"].get_group() if way.tensor > 1 else None
    if settings.model == "full-flux":
        from random_flux import build_pipeline, inputs

        pipe = build_pipeline(
            device, shared, packed=way.packed, compute=settings.compute, backend=settings.backend,
            layers=settings.layers,
        )  # fmt: skip
        return pipe, inputs(pipe, device)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from quantkit_runtime import load_pipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    chosen = {"compute": settings.compute, "backend": settings.backend} if way.packed else {}
    pipe = load_pipeline(
        Path(folder, "packed") if way.packed else DEMO, device=device, tensor_parallel=shared, **chosen
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": list(PROMPTS), "negative_prompt": "", "max_sequence_length": 48}
