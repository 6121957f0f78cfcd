"""Keys and values of several answers side by side, each with a length of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GROWTH_TOKENS = 256


class SlotCache:
    """A key-value cache of rows that come and go; to a transformers model it looks like one of its own.

    Row ``i`` holds ``lengths[i]`` tokens from the left; what is to their right is never attended to. Rows are
    always the first ones of the tensors, so that a step reads a slice and copies nothing: when an answer ends, the
    last row moves into its place. Tensors are (rows, heads, tokens, head size), grown in steps of 256 tokens.

    Attributes:
        lengths: Tokens in each row.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._part = slice(0, 0)
        self._rows = torch.empty(0, dtype=torch.long)
        self._ends = torch.empty(0, dtype=torch.long)

    def append(self, prompt: Any) -> int:
        """Take over the cache of one prompt, as transformers fills it; return its row."""
        layers = [(layer.keys, layer.values) for layer in prompt.layers]
        length = layers[0][0].shape[-2]
        row = len(self.lengths)
        self._reserve(row + 1, length + 1, layers)
        for ours, (keys, values) in zip(zip(self._keys, self._values, strict=True), layers, strict=True):
            ours[0][row, :, :length] = keys[0]
            ours[1][row, :, :length] = values[0]
        self.lengths.append(length)
        return row

    def remove(self, row: int, *, is_damaged: bool = False) -> None:
        """Forget a row; the last one takes its place.

        Args:
            row: Which.
            is_damaged: Whether it may hold what is not finite, of which nothing may be left: masked values are
                multiplied by zero, and what is not finite stays so.
        """
        last = len(self.lengths) - 1
        if is_damaged:
            for tensor in (*self._keys, *self._values):
                tensor[row] = 0
        if row != last:
            length = self.lengths[last]
            for tensor in (*self._keys, *self._values):
                tensor[row, :, :length] = tensor[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:  # an idle server needs no memory for it
            self._keys, self._values = [], []

    def begin_step(self, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Make room for one token in each of some rows, which the model then reads.

        Args:
            first: Of the rows.
            count: Of the rows; None is all from the first on.

        Returns:
            Positions (rows, 1) of the new tokens, and what they may attend to, (rows, 1, 1, tokens) of bool.
        """
        layers = list(zip(self._keys, self._values, strict=True))
        self._reserve(len(self.lengths), max(self.lengths) + 1, layers)
        self._part = slice(first, len(self.lengths) if count is None else first + count)
        lengths = self.lengths[self._part]
        device = layers[0][0].device
        self._ends = torch.tensor(lengths, device=device)
        self._rows = torch.arange(len(lengths), device=device)
        positions = self._ends[:, None]
        tokens = torch.arange(max(lengths) + 1, device=device)
        return positions, (tokens[None] <= positions)[:, None, None]

    def end_step(self) -> None:
        """Count the new token of every row that took one."""
        self.lengths[self._part] = [length + 1 for length in self.lengths[self._part]]

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the new token of each row behind its others; return the rows up to the longest. Called by layers."""
        end = max(self.lengths[self._part]) + 1
        held = self._keys[layer][self._part], self._values[layer][self._part]
        for tensor, new in zip(held, (keys, values), strict=True):
            tensor[self._rows, :, self._ends] = new[:, :, 0]
        return held[0][:, :, :end], held[1][:, :, :end]

    def _reserve(self, rows: int, tokens: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Grow to at least so many rows and tokens.

        Args:
            rows: Wanted.
            tokens: Wanted.
            layers: Keys and values that tell shapes and dtypes.
        """
        now = self._keys[0].shape if self._keys else (0, 0, 0, 0)
        if now[0] >= rows and now[2] >= tokens:
            return
        if tokens > now[2]:  # by half again at least, so that long answers are copied few times
            tokens = max(tokens, now[2] * 3 // 2)
            tokens = -(-tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS
        else:
            tokens = now[2]
        rows = max(rows, now[0] * 2) if rows > now[0] else now[0]
        grown: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index, pair in enumerate(layers):
            for side, like in enumerate(pair):
                tensor = like.new_zeros(rows, like.shape[1], tokens, like.shape[3])
                if now[0]:
                    tensor[: now[0], :, : now[2]] = (self._keys, self._values)[side][index]
                grown[side].append(tensor)
        self._keys, self._values = grown
