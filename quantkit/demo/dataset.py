"""Drawn training data: images, tokenized captions and the attributes that the captions name."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from quantkit.demo.captions import random_caption
from quantkit.demo.drawing import draw
from quantkit.demo.scenes import (
    BACKGROUND_COLOURS,
    CANVAS_PX,
    OBJECT_COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    scenes,
)
from quantkit.demo.tokenizers import CAPTION_TOKENS

_CHUNK = 2000
_OBJECT_OPTIONS = (tuple(OBJECT_COLOURS), SHAPES, (None, *SIZES))

LABEL_SIZES = (
    *(len(options) for options in _OBJECT_OPTIONS),
    *(len(options) for options in _OBJECT_OPTIONS),
    1 + len(POSITIONS),
    1 + len(RELATIONS),
    4,
    len(BACKGROUND_COLOURS),
)


@dataclass
class Dataset:
    """Captioned images.

    Attributes:
        images: uint8, (n, 3, 64, 64), RGB.
        clip_ids: int64, (n, 48), padded.
        t5_ids: int64, (n, 48), padded.
        labels: int64, (n, len(LABEL_SIZES)): the index of each attribute's value among its options.
    """

    images: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    labels: torch.Tensor


def _object_labels(item: SceneObject) -> list[int]:
    values = (item.colour, item.shape, item.size)
    return [options.index(value) for options, value in zip(_OBJECT_OPTIONS, values, strict=True)]


def labels(scene: Scene) -> list[int]:
    """Return the index of each attribute's value among its options, in the order of ``LABEL_SIZES``."""
    return [
        *_object_labels(scene.objects[0]),
        *_object_labels(scene.objects[-1]),
        (None, *POSITIONS).index(scene.position),
        (None, *RELATIONS).index(scene.relation),
        len(scene.objects) - 1,
        tuple(BACKGROUND_COLOURS).index(scene.background),
    ]


def _draw_chunk(seed: int) -> tuple[npt.NDArray[np.uint8], list[str], list[list[int]]]:
    rng = np.random.default_rng([seed, 1])
    images = np.empty((_CHUNK, CANVAS_PX, CANVAS_PX, 3), dtype=np.uint8)
    texts, rows = [], []
    for index, scene in zip(range(_CHUNK), scenes("train", seed), strict=False):
        images[index] = draw(scene, rng)
        texts.append(random_caption(scene, rng))
        rows.append(labels(scene))
    return images, texts, rows


def _chunks(count: int, seed: int) -> Iterator[tuple[npt.NDArray[np.uint8], list[str], list[list[int]]]]:
    seeds = [seed + index for index in range(-(-count // _CHUNK))]
    # Forked: a spawned worker would first import torch, which takes longer than drawing. Workers use numpy alone.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        yield from pool.imap(_draw_chunk, seeds)


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> torch.Tensor:
    """Tokenize texts as the pipeline does, padded: int64, (n, 48)."""
    ids: torch.Tensor = tokenizer(
        texts, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def draw_dataset(count: int, seed: int, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> Dataset:
    """Draw at least ``count`` captioned training images on all processor cores, the same ones for the same seed."""
    images, texts, rows = [], [], []
    for chunk_images, chunk_texts, chunk_rows in _chunks(count, seed):
        images.append(torch.from_numpy(chunk_images).permute(0, 3, 1, 2))
        texts += chunk_texts
        rows += chunk_rows
    return Dataset(
        images=torch.cat(images),
        clip_ids=token_ids(clip_tokenizer, texts),
        t5_ids=token_ids(t5_tokenizer, texts),
        labels=torch.tensor(rows),
    )
