"""Trains the embedded demo pipeline from nothing: ``python -m quantkit.demo.train --output DIR``.

Draws its own data, trains the autoencoder, then the transformer with both text encoders, and saves an ordinary
FLUX pipeline in bfloat16. Takes eleven minutes on one NVIDIA H200.
"""

import argparse
import logging
import time
from pathlib import Path

import torch

from quantkit.demo.architecture import (
    build_autoencoder,
    build_clip,
    build_pipeline,
    build_t5,
    build_transformer,
)
from quantkit.demo.dataset import draw_dataset, token_ids
from quantkit.demo.evaluate import Sampling, evaluate, format_scores
from quantkit.demo.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from quantkit.demo.train_autoencoder import AutoencoderSettings, encode, train_autoencoder
from quantkit.demo.train_flow import FlowData, FlowSettings, TextToFlow, train_flow
from quantkit.errors import OutputError

SEED = 20
TRAINING_IMAGES = 160_000

_SCORED_CAPTIONS = 128
_SCORE_BATCH = 128
_logger = logging.getLogger(__name__)


def train(
    output: Path,
    images: int = TRAINING_IMAGES,
    autoencoder_settings: AutoencoderSettings | None = None,
    flow_settings: FlowSettings | None = None,
) -> None:
    """Train the demo pipeline and save it.

    Args:
        output: directory to save the pipeline to; must not exist or be empty.
        images: number of training images to draw.
        autoencoder_settings: other hyperparameters than the defaults.
        flow_settings: other hyperparameters than the defaults.

    Raises:
        OutputError: the output directory is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not an empty directory; choose another --output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # The backward pass of cuDNN's attention fails with an illegal memory access at head size 32 (H200, torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)

    started = time.perf_counter()
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    drawn = draw_dataset(images, SEED, clip_tokenizer, t5_tokenizer)
    pixels = drawn.images.to(device)
    _logger.info("drew %d images in %.0f s", len(pixels), time.perf_counter() - started)

    autoencoder = build_autoencoder().to(device)
    train_autoencoder(autoencoder, pixels, autoencoder_settings or AutoencoderSettings())
    data = FlowData(
        latents=encode(autoencoder, pixels),
        clip_ids=drawn.clip_ids.to(device),
        t5_ids=drawn.t5_ids.to(device),
        labels=drawn.labels.to(device),
        empty_clip_ids=token_ids(clip_tokenizer, [""])[0].to(device),
        empty_t5_ids=token_ids(t5_tokenizer, [""])[0].to(device),
    )
    _logger.info("autoencoder and latents done after %.0f s", time.perf_counter() - started)

    def save(step: int, averaged: TextToFlow) -> None:
        # Built anew from the weights: putting a pipeline together converts its components to bfloat16.
        parts = build_clip(clip_tokenizer), build_t5(t5_tokenizer), build_transformer(), build_autoencoder()
        trained = averaged.clip, averaged.t5, averaged.transformer, autoencoder
        for part, source in zip(parts, trained, strict=True):
            part.load_state_dict(source.state_dict())
            part.eval()
        clip, t5, transformer, decoder = parts
        decoder.register_to_config(
            shift_factor=autoencoder.config.shift_factor, scaling_factor=autoencoder.config.scaling_factor
        )
        pipeline = build_pipeline(decoder, clip, clip_tokenizer, t5, t5_tokenizer, transformer)
        pipeline.save_pretrained(output)
        scores = evaluate(pipeline.to(device), _SCORED_CAPTIONS, Sampling(), _SCORE_BATCH)
        _logger.info("step %d, %.0f s: %s", step, time.perf_counter() - started, format_scores(scores))

    model = TextToFlow(build_clip(clip_tokenizer), build_t5(t5_tokenizer), build_transformer()).to(device)
    train_flow(model, data, flow_settings or FlowSettings(), save)


def main() -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(prog="python -m quantkit.demo.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the trained pipeline")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    train(options.output)


if __name__ == "__main__":
    main()
