"""Every number that a comparison knows: what it means and which way is better.

`METRICS` is the only list of single numbers, `CURVES` that of numbers along steps, frames or tokens. Thresholds in
recipes name keys of `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MetricKind = Literal["trajectory", "picture", "video", "text", "cost"]
Axis = Literal["denoising step", "frame", "token"]
Better = Literal["higher", "lower"]

PSNR_CAP_DB = 100.0
"""Identical images have an infinite PSNR; it and everything beyond this is reported as this."""


@dataclass(frozen=True)
class Metric:
    """What one number of a comparison means.

    Attributes:
        label: Short name for people.
        kind: ``trajectory`` (from latents), ``picture`` (from images or the frames of a video), ``video`` (from how
            frames follow each other), ``text`` (from answers), ``cost`` (time and memory).
        unit: Unit, empty where the number has none.
        better: Direction of improvement.
        low: Smallest possible value, None where there is none.
        high: Largest possible value, None where there is none.
        meaning: One sentence.
    """

    label: str
    kind: MetricKind
    unit: str
    better: Better
    low: float | None
    high: float | None
    meaning: str


METRICS: Mapping[str, Metric] = {
    "latent_rel_l2": Metric(
        "Latent relative L2, last step", "trajectory", "", "lower", 0, None,
        "||candidate - reference|| / ||reference|| of the final latents.",
    ),
    "latent_rel_l2_median_over_steps": Metric(
        "Latent relative L2, median step", "trajectory", "", "lower", 0, None,
        "Median over the denoising steps of the relative L2 distance of the latents.",
    ),
    "latent_rel_l2_max_over_steps": Metric(
        "Latent relative L2, worst step", "trajectory", "", "lower", 0, None,
        "Largest relative L2 distance of the latents at any denoising step.",
    ),
    "latent_cosine": Metric(
        "Latent cosine, last step", "trajectory", "", "higher", -1, 1,
        "Cosine of the angle between the final latents.",
    ),
    "latent_cosine_min_over_steps": Metric(
        "Latent cosine, worst step", "trajectory", "", "higher", -1, 1,
        "Smallest cosine between the latents at any denoising step.",
    ),
    "psnr": Metric(
        "PSNR", "picture", "dB", "higher", 0, PSNR_CAP_DB,
        "Peak signal-to-noise ratio of the 8-bit pictures, capped at 100 dB (identical pictures).",
    ),
    "ssim": Metric(
        "SSIM", "picture", "", "higher", -1, 1,
        "Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5), mean over the channels.",
    ),
    "mae": Metric(
        "Mean absolute error", "picture", "of 255", "lower", 0, 255,
        "Mean absolute difference of the 8-bit channel values.",
    ),
    "rmse": Metric(
        "Root mean square error", "picture", "of 255", "lower", 0, 255,
        "Root of the mean squared difference of the 8-bit channel values.",
    ),
    "image_cosine": Metric(
        "Image cosine", "picture", "", "higher", 0, 1, "Cosine of the angle between the pictures' channel values."
    ),
    "image_rel_l2": Metric(
        "Image relative L2", "picture", "", "lower", 0, None,
        "||candidate - reference|| / ||reference|| of the pictures' channel values.",
    ),
    "flip": Metric(
        "FLIP", "picture", "", "lower", 0, 1,
        "Mean difference a viewer perceives when flipping between the pictures (Andersson et al. 2020, 67 ppd).",
    ),
    "lpips": Metric(
        "LPIPS", "picture", "", "lower", 0, None,
        "Learned perceptual distance (Zhang et al. 2018, AlexNet, version 0.1).",
    ),
    "psnr_min_over_frames": Metric(
        "PSNR, worst frame", "video", "dB", "higher", 0, PSNR_CAP_DB, "Smallest PSNR of any frame."
    ),
    "ssim_min_over_frames": Metric(
        "SSIM, worst frame", "video", "", "higher", -1, 1, "Smallest SSIM of any frame."
    ),
    "psnr_drift": Metric(
        "PSNR drift", "video", "dB", "higher", -PSNR_CAP_DB, PSNR_CAP_DB,
        "Mean PSNR of the last quarter of the frames minus that of the first quarter; below 0 it gets worse.",
    ),
    "ssim_drift": Metric(
        "SSIM drift", "video", "", "higher", -2, 2,
        "Mean SSIM of the last quarter of the frames minus that of the first quarter; below 0 it gets worse.",
    ),
    "mae_drift": Metric(
        "Error drift", "video", "of 255", "lower", -255, 255,
        "Mean absolute error of the last quarter of the frames minus that of the first quarter; above 0 it gets "
        "worse.",
    ),
    "temporal_difference_mae": Metric(
        "Temporal difference error", "video", "of 255", "lower", 0, 510,
        "Mean absolute difference between the candidate's and the reference's change from one frame to the next; "
        "sees flicker that errors of single frames miss.",
    ),
    "temporal_flickering_change": Metric(
        "Steadiness, candidate minus reference", "video", "", "higher", -1, 1,
        "1 - mean |frame difference| / 255 of the candidate minus that of the reference; below 0 the candidate "
        "flickers or moves more.",
    ),
    "token_agreement": Metric(
        "Token agreement", "text", "", "higher", 0, 1,
        "Share of the reference's tokens at which both models, given the same text so far, find the same token "
        "most likely.",
    ),
    "token_kl": Metric(
        "KL divergence per token", "text", "nats", "lower", 0, None,
        "Mean over the reference's tokens of KL(reference || candidate) of the next-token distributions.",
    ),
    "token_kl_max": Metric(
        "KL divergence, worst token", "text", "nats", "lower", 0, None, "Largest KL divergence at any token."
    ),
    "token_logprob_change": Metric(
        "Log-probability change", "text", "nats", "lower", 0, None,
        "Mean over the reference's tokens of |log p candidate - log p reference| of that token.",
    ),
    "token_probability": Metric(
        "Probability of the reference's token", "text", "", "higher", 0, 1,
        "Mean probability that the candidate gives to the reference's tokens.",
    ),
    "same_prefix": Metric(
        "Same beginning", "text", "", "higher", 0, 1,
        "Share of the reference's answer that the candidate, writing freely, repeats before its first other token.",
    ),
    "same_answer": Metric(
        "Same answer", "text", "", "higher", 0, 1,
        "1 where the candidate, writing freely, gives the reference's answer token by token, else 0.",
    ),
    "step_time_ratio": Metric(
        "Time per step, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the median times of a step (of denoising, or one token), per image, video or answer.",
    ),
    "peak_memory_ratio": Metric(
        "Peak memory, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the peak memory of loading and sampling.",
    ),
    "weight_memory_ratio": Metric(
        "Weights in memory, candidate / reference", "cost", "x", "lower", 0, None,
        "Ratio of the bytes that the models' parameters and buffers hold.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a row of numbers along an axis means.

    Attributes:
        label: Title of its chart.
        axis: What it runs along.
        unit: Unit, empty where the numbers have none.
        logarithmic: Whether factors matter rather than differences; 0 is then drawn at the bottom.
        first: Number of the first value on the axis.
    """

    label: str
    axis: Axis
    unit: str = ""
    logarithmic: bool = True
    first: int = 1


CURVES: Mapping[str, Curve] = {
    "latent_rel_l2": Curve("Relative L2 distance of the latents", "denoising step"),
    "latent_cosine_distance": Curve("1 \N{MINUS SIGN} cosine of the latents", "denoising step"),
    "frame_psnr": Curve("PSNR of every frame", "frame", "dB", logarithmic=False),
    "frame_motion_error": Curve("Error of the change since the frame before", "frame", "of 255", first=2),
    "token_kl": Curve("KL divergence of the next token", "token", "nats"),
    "token_logprob_change": Curve("Change of the log-probability of the reference's token", "token", "nats"),
}
