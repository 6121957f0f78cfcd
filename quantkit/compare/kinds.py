"""Which words and which numbers lead in the report of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.compare.metrics import METRICS, MetricKind
from quantkit.compare.result import Item
from quantkit.errors import RecipeError, UnsupportedModelError
from quantkit.families.registry import get_family
from quantkit.gate.thresholds import check_names
from quantkit.recipe.load import LoadedRecipe
from quantkit.recipe.schema import Task


@dataclass(frozen=True)
class Kind:
    """One kind of output.

    Attributes:
        output: What a model makes, e.g. ``image``.
        step: What it takes many of, e.g. ``denoising step``.
        headline: Metric of the first tile.
        sort: Metrics that decide which prompt is the worst; the first that was measured does.
        captions: Metric -> short name, beside every output.
        swarms: Metrics drawn per prompt even if no threshold bounds them.
        path: Curves along the steps.
        measured: Kinds of metrics that a comparison of this task measures.
        frames: Curves along the frames.
    """

    output: str
    step: str
    headline: str
    sort: tuple[str, ...]
    captions: Mapping[str, str]
    swarms: tuple[str, ...]
    path: tuple[str, ...]
    measured: tuple[MetricKind, ...]
    frames: tuple[str, ...] = ()

    def metrics(self) -> list[str]:
        """Return the metrics that can be bounded."""
        return [name for name, metric in METRICS.items() if metric.kind in self.measured]

    def sort_metric(self, items: Sequence[Item]) -> str:
        """Return the metric by which prompts are sorted."""
        return next((name for name in self.sort if any(name in item.metrics for item in items)), self.sort[-1])


_PATH = ("latent_rel_l2", "latent_cosine_distance")
_VIDEO = Kind(
    output="video",
    step="denoising step",
    headline="latent_rel_l2",
    sort=("flip", "mae"),
    captions={
        "flip": "FLIP", "psnr": "PSNR", "psnr_min_over_frames": "worst frame", "ssim": "SSIM",
        "temporal_difference_mae": "motion error", "latent_rel_l2": "latent L2",
    },
    swarms=("flip", "psnr_min_over_frames", "temporal_difference_mae", "temporal_flickering_change"),
    path=_PATH,
    measured=("trajectory", "picture", "video", "cost"),
    frames=("frame_psnr", "frame_motion_error"),
)  # fmt: skip

KINDS: Mapping[Task, Kind] = {
    "t2i": Kind(
        output="image",
        step="denoising step",
        headline="latent_rel_l2",
        # What the eye sees decides which prompt is the worst; FLIP where it could be computed.
        sort=("flip", "mae"),
        captions={"flip": "FLIP", "psnr": "PSNR", "ssim": "SSIM", "latent_rel_l2": "latent L2"},
        swarms=("flip", "psnr", "latent_rel_l2", "ssim"),
        path=_PATH,
        measured=("trajectory", "picture", "cost"),
    ),
    "t2v": _VIDEO,
    "i2v": _VIDEO,
    "chat": Kind(
        output="answer",
        step="token",
        headline="token_agreement",
        sort=("token_kl",),
        captions={
            "token_agreement": "agreement", "token_kl": "KL", "token_probability": "probability",
            "same_prefix": "same beginning",
        },
        swarms=("token_agreement", "token_kl", "token_probability", "same_prefix"),
        path=("token_kl", "token_logprob_change"),
        measured=("text", "cost"),
    ),
}  # fmt: skip


def check_thresholds(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose family does not do its task, or that bounds a metric which its task does not have.

    Raises:
        RecipeError: With one problem per unknown name and the closest known one.
        UnsupportedModelError: If the recipe names a family that does not exist.
    """
    recipe = loaded.recipe
    if recipe.model.family is not None:
        family = get_family(recipe.model.family)
        try:
            family.for_task(recipe.model.task)
        except UnsupportedModelError as error:
            reason = f"recipes of {family.name} say {family.task}, not {recipe.model.task}"
            raise RecipeError(f"{loaded.path}: model.task: {reason}") from error
    known = KINDS[recipe.model.task].metrics()
    changed = [f"--set {text}" for text in loaded.overrides if text.startswith(("compare.thresholds", "compare="))]
    where = f"{loaded.path}, with {', '.join(changed)}" if changed else str(loaded.path)
    check_names(recipe.compare.thresholds, known, f"{where}: compare.thresholds")
