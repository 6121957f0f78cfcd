"""The layout in which the Triton kernels read 4-bit codes.

Legend: K = in_features, N = out_features, B = ceil(K / 128) tiles along K.

======  =====  ==========  ==================================================================================
tensor  dtype  shape       content
======  =====  ==========  ==================================================================================
tiles   int32  (B, N, 16)  nibble j of word i is the code of input feature 128 b + 16 j + i
======  =====  ==========  ==================================================================================

So one nibble of the 16 words of a tile covers 16 neighbouring input features, the depth of one tensor core
instruction: words go from memory to the registers in which the instruction wants its operand, and are unpacked
there. Groups of 16, 32, 64 or a multiple of 128 input features are made of whole slices. The tiles have as many
bytes as the checkpoint's ``qweight``, the last one along K apart, which is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_runtime.bitstream import pack_words, unpack_words
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import pack_codes, unpack_codes

TILE = 128
"""Input features of a tile."""
SLICE = 16
"""Input features that share the position of a nibble."""
PART = 128
"""Output features that one program of a product of few rows computes."""
_BITS = 4
_NIBBLES = 8


def to_tiles(qweight: Tensor, scheme: Scheme) -> Tensor:
    """Repack a checkpoint's ``qweight``, or a stack of them with a leading axis.

    Args:
        qweight: As `quantkit_runtime.format` describes it, for 4 bits.
        scheme: How it is stored.

    Returns:
        (B, N, 16) int32, with the leading axis of a stack.
    """
    if qweight.ndim > 2:
        return torch.stack([to_tiles(entry, scheme) for entry in qweight])
    codes = unpack_codes(qweight, scheme)
    out_features, in_features = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -in_features % TILE))
    slices = padded.view(out_features, -1, _NIBBLES, SLICE).permute(1, 0, 3, 2)
    return pack_words(slices.contiguous(), _BITS).squeeze(-1)


def from_tiles(tiles: Tensor, scheme: Scheme, in_features: int) -> Tensor:
    """Inverse of :func:`to_tiles`.

    Args:
        tiles: (B, N, 16) int32, with or without the leading axis of a stack.
        scheme: How the result is stored.
        in_features: K.

    Returns:
        The checkpoint's ``qweight``, bit for bit.
    """
    if tiles.ndim > 3:
        return torch.stack([from_tiles(entry, scheme, in_features) for entry in tiles])
    count, out_features, _ = tiles.shape
    codes = unpack_words(tiles, _BITS).view(count, out_features, SLICE, _NIBBLES).permute(1, 0, 3, 2)
    return pack_codes(codes.reshape(out_features, -1)[:, :in_features].contiguous(), scheme)


def code_ptx(position: int, ones: int) -> str:
    """Return PTX that sets codes into a pair of 16-bit floats: ``t`` from the words ``$1`` and ``$2``.

    Args:
        position: Of the nibble.
        ones: Bits of a float whose last four mantissa bits count ones, to which a code set there adds itself.
    """
    halves = 0x5410 if position < 4 else 0x7632
    return (
        f"prmt.b32 t, $1, $2, {halves:#x}; shr.u32 t, t, {4 * (position % 4)}; "
        f"lop3.b32 t, t, 0x000f000f, {ones * 0x10001:#010x}, 0xea;"
    )


def unfit(scheme: Scheme, in_features: int) -> str | None:
    """Return why codes of this scheme cannot be read as tiles, or None."""
    if scheme.bits != _BITS:
        return f"it reads 4-bit codes, these have {scheme.bits}"
    length = scheme.group_length(in_features)
    if length < in_features and TILE % length and length % TILE:
        return f"it reads groups of 16, 32, 64 or a multiple of 128 input features, not of {length}"
    if length < SLICE:
        return f"it reads groups of at least {SLICE} input features, not of {length}"
    return None
