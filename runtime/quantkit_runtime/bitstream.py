"""Codes of a few bits as a little-endian stream in int32 words, and back.

Along the packed axis, code i of each run of 32 codes occupies bits [i * b, (i + 1) * b) of the run's b words. At
2, 4 and 8 bits no code straddles two words, so shorter runs fill whole words too.
"""

import torch
from torch import Tensor

WORD_BITS = 32
_WORD_MASK = 0xFFFFFFFF
_BYTE_BITS = 8


def codes_per_run(bits: int) -> int:
    """Length of the shortest run of codes that fills whole words; a packed axis is a multiple of it."""
    return WORD_BITS // bits if WORD_BITS % bits == 0 else WORD_BITS


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack (..., n) integers in [0, 2 ** bits) into (..., n * bits / 32) int32 words."""
    if _BYTE_BITS % bits == 0:
        octets = codes.to(torch.uint8).reshape(-1)
        for width in _doublings(bits):  # two neighbours of some bits each become one of twice as many
            pairs = octets.view(torch.int16)  # every platform that torch runs on is little-endian
            octets = (pairs >> (_BYTE_BITS - width)).bitwise_or_(pairs).to(torch.uint8)
        return octets.view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] * bits // WORD_BITS)
    runs = _split(codes, codes_per_run(bits))
    words = torch.zeros(
        *runs.shape[:-1], runs.shape[-1] * bits // WORD_BITS, dtype=torch.int32, device=codes.device
    )
    for position in range(runs.shape[-1]):
        word, offset = divmod(position * bits, WORD_BITS)
        code = runs[..., position].to(torch.int32)
        words[..., word] |= code << offset
        if offset + bits > WORD_BITS:
            words[..., word + 1] |= code >> (WORD_BITS - offset)
    return words.flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unpack (..., w) int32 words into (..., w * 32 / bits) uint8 codes."""
    if _BYTE_BITS % bits == 0:
        octets = words.reshape(-1).view(torch.uint8)
        for width in reversed(_doublings(bits)):
            pairs = octets.to(torch.int16)
            halves = (pairs << (_BYTE_BITS - width)).bitwise_or_(pairs)
            octets = halves.bitwise_and_(((1 << width) - 1) * 0x0101).view(torch.uint8)
        return octets.view(*words.shape[:-1], words.shape[-1] * WORD_BITS // bits)
    mask = (1 << bits) - 1
    runs = _split(words, bits).to(torch.int64) & _WORD_MASK
    columns = []
    for position in range(WORD_BITS):
        word, offset = divmod(position * bits, WORD_BITS)
        code = runs[..., word] >> offset
        if offset + bits > WORD_BITS:
            code = code | (runs[..., word + 1] << (WORD_BITS - offset))
        columns.append((code & mask).to(torch.uint8))
    return torch.stack(columns, -1).flatten(-2)


def _doublings(bits: int) -> list[int]:
    """Widths below a byte's that doubling passes through: 2 gives [2, 4], 4 gives [4], 8 none."""
    return [width for width in (2, 4) if width >= bits]


def reorder(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute each run of ``len(order)`` values along the last axis: the result's value i is ``order[i]`` of it."""
    index = torch.tensor(order, device=values.device)
    return _split(values, len(order)).index_select(-1, index).flatten(-2)


def _split(values: Tensor, length: int) -> Tensor:
    """(..., n * length) to (..., n, length)."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // length, length)
