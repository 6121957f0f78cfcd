"""What BAGEL reads: texts between marks of begin and end, pictures between marks of their own.

The model knows no roles. A conversation is its texts and pictures one after the other, as its authors feed it
(``Bagel.chat`` of ByteDance-Seed/Bagel; their demo makes a picture a multiple of 16 pixels first, as for editing).
An answer begins with the mark that begins a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.generation.text import load_processor
from quantkit_runtime.models.bagel_config import BagelConfig
from quantkit_runtime.optional import import_optional

TEXT_BEGIN, TEXT_END = "<|im_start|>", "<|im_end|>"
_MARKS = (TEXT_BEGIN, TEXT_END, "<|vision_start|>", "<|vision_end|>")
_SHORTEST_SIDE = 16
"""Patches of a picture's shorter side, where its shape allows: 224 pixels."""


class BagelProcessor:
    """Turns texts and pictures into the inputs of a BAGEL.

    Args:
        folder: Of the model.

    Attributes:
        tokenizer: Of transformers.
        marks: Tokens that begin and end a text, and begin and end a picture.

    Raises:
        CheckpointFormatError: The folder holds no tokenizer, or one without these tokens.
    """

    def __init__(self, folder: Path) -> None:
        transformers = import_optional("transformers")
        plain = transformers.PretrainedConfig()  # transformers does not know the model's own
        self.tokenizer: Any = load_processor(transformers.AutoTokenizer, folder, config=plain)
        known = self.tokenizer.get_vocab()
        if missing := [mark for mark in _MARKS if mark not in known]:
            raise CheckpointFormatError(f"{folder}: its tokenizer has no {missing[0]}; download the model again")
        self.marks: tuple[int, ...] = tuple(int(known[mark]) for mark in _MARKS)
        config = BagelConfig.read(folder)
        self._patch, self._side = config.vision.patch_size, config.patches_per_side

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        text: str = self.tokenizer.decode(tokens)
        return text

    def __call__(self, parts: Sequence[Any], *, answer: bool = True) -> dict[str, Tensor]:
        """Return the inputs of a conversation, a batch of one on the CPU.

        Args:
            parts: Texts, and pictures of PIL in RGB.
            answer: Whether an answer is to follow.

        Returns:
            ``input_ids``, int64 (1, T), with the mark that begins a picture in place of its patches.
            ``positions``, int64 (1, T): all tokens of a picture have one.
            ``pictures``, int64 (1, T): the number of the picture a token is of, marks included; 0 for text.
            ``is_patch``, bool (1, T).
            ``patches``, float32 (patches, pixels of a patch), and ``patch_positions``, int64 (patches,), of all
            pictures.
        """
        text_begin, text_end, picture_begin, picture_end = self.marks
        tokens: list[int] = []
        positions: list[int] = []
        pictures: list[int] = []
        is_patch: list[bool] = []
        patches: list[Tensor] = []
        patch_positions: list[Tensor] = []
        position = 0
        for part in parts:
            if isinstance(part, str):
                new = [text_begin, *self.tokenizer.encode(part, add_special_tokens=False), text_end]
                positions += range(position, position + len(new))
                position += len(new)
                pictures += [0] * len(new)
                is_patch += [False] * len(new)
            else:
                cut, places = self._cut(part)
                patches.append(cut)
                patch_positions.append(places)
                new = [picture_begin] * (len(places) + 1) + [picture_end]
                positions += [position] * len(new)
                position += 1
                pictures += [len(patches)] * len(new)
                is_patch += [False, *[True] * len(places), False]
            tokens += new
        if answer:
            tokens.append(text_begin)
            positions.append(position)
            pictures.append(0)
            is_patch.append(False)
        return {
            "input_ids": torch.tensor([tokens]),
            "positions": torch.tensor([positions]),
            "pictures": torch.tensor([pictures]),
            "is_patch": torch.tensor([is_patch]),
            "patches": torch.cat(patches) if patches else torch.empty(0, 3 * self._patch**2),
            "patch_positions": torch.cat(patch_positions) if patches else torch.empty(0, dtype=torch.long),
        }

    def _cut(self, picture: Any) -> tuple[Tensor, Tensor]:
        """Return the patches of a picture, (T, pixels), and their places in the grid of the largest one, (T,)."""
        size = self._patch
        columns, rows = self._grid(picture.width, picture.height)
        resampling = import_optional("PIL.Image").Resampling.BICUBIC
        resized = np.asarray(picture.resize((columns * size, rows * size), resampling), dtype=np.float32)
        pixels = torch.from_numpy(resized / 127.5 - 1)
        patches = pixels.view(rows, size, columns, size, 3).transpose(1, 2).reshape(rows * columns, -1)
        places = torch.arange(rows)[:, None] * self._side + torch.arange(columns)
        return patches, places.flatten()

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of patches: no side longer than the model knows, the shorter not too short."""
        longest, shortest = self._side * self._patch, min(_SHORTEST_SIDE, self._side) * self._patch
        scale = max(min(longest / max(width, height), 1.0), shortest / min(width, height))
        columns, rows = (max(round(round(side * scale) / self._patch), 1) for side in (width, height))
        if max(columns, rows) > self._side:
            scale = self._side / max(columns, rows)
            columns, rows = (max(round(side * scale), 1) for side in (columns, rows))
        return columns, rows
