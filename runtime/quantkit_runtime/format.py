"""The on-disk layout of a packed Linear layer: reference pack, unpack and dequantize.

Exporters, checkers and kernels share this one description.

Legend: K = in_features, N = out_features, G = number of groups = K / group length, b = bits.

=========  =========  =====================================  ==========================================
tensor     dtype      shape, gptq and plain packing          shape, awq packing (b = 4)
=========  =========  =====================================  ==========================================
qweight    int32      (K * b / 32, N)                        (K, N * b / 32)
qzeros     int32      (G, N * b / 32)                        (G, N * b / 32)
scales     float16    (G, N)                                 (G, N)
bias       as stored  (N,)                                   (N,)
=========  =========  =====================================  ==========================================

An int32 tensor holds a little-endian stream of b-bit codes along the packed axis: code i of each run of 32
codes occupies bits [i * b, (i + 1) * b) of its b words. At 2, 4 and 8 bits no code straddles two words.

==========================  ===========================  ==============================================
packing_format              stored zero point            order of codes in a word
==========================  ===========================  ==============================================
``auto_round:auto_gptq``    zero - 1 (so never 0)        ascending
``auto_round``              zero                         ascending
``auto_round:auto_awq``     zero                         nibbles hold codes 0, 2, 4, 6, 1, 3, 5, 7
==========================  ===========================  ==============================================

The weight is ``scale * (code - zero)``; a symmetric scheme has ``zero = 2 ** (b - 1)`` everywhere.

Source: auto-round 0.16, ``auto_round_extension/torch/qlinear_torch.py`` (plain), ``qlinear_torch_zp.py`` (gptq),
``export/export_to_awq/utils.py`` (awq) and ``utils/bit_packing.py`` (the stream).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit_runtime.bitstream import WORD_BITS, codes_per_run, pack_words, reorder, unpack_words
from quantkit_runtime.config import PACKING_FORMATS, QUANT_METHODS, SUPPORTED_BITS, QuantizationConfig, Scheme
from quantkit_runtime.errors import CheckpointFormatError

__all__ = [
    "PACKED_SUFFIXES",
    "PACKING_FORMATS",
    "QUANT_METHODS",
    "SUPPORTED_BITS",
    "QuantizationConfig",
    "Scheme",
    "dequantize",
    "pack",
    "pack_codes",
    "packed_tensors",
    "unpack",
    "unpack_codes",
    "unpack_zeros",
]

PACKED_SUFFIXES = ("qweight", "qzeros", "scales")

_AWQ_STORED_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_LOGICAL_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_CPU_BLOCK_WEIGHTS = 1 << 20


def packed_tensors(
    in_features: int, out_features: int, scheme: Scheme
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of each tensor that stores a layer's weight, keyed by name suffix.

    Raises:
        CheckpointFormatError: The layer's shape does not fit the scheme's groups or packing.
    """
    length = scheme.group_length(in_features)
    if in_features < 1 or in_features % length:
        raise CheckpointFormatError(
            f"in_features {in_features} is not divisible by group_size {scheme.group_size}; keep this layer in 16 "
            "bit or choose another group size"
        )
    packed_axis = {"out_features": out_features}
    if not _is_awq(scheme):
        packed_axis["in_features"] = in_features
    for name, size in packed_axis.items():
        step = codes_per_run(scheme.bits)
        if size < 1 or size % step:
            raise CheckpointFormatError(
                f"{name} {size} is not a multiple of {step}, which {scheme.bits}-bit packing needs; keep this "
                "layer in 16 bit"
            )
    groups = in_features // length
    out_words = out_features * scheme.bits // WORD_BITS
    qweight = (
        (in_features, out_words) if _is_awq(scheme) else (in_features * scheme.bits // WORD_BITS, out_features)
    )
    return {
        "qweight": (qweight, torch.int32),
        "qzeros": ((groups, out_words), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> dict[str, Tensor]:
    """Pack integer codes into the stored tensors.

    Args:
        codes: (N, K), any integer dtype, values in [0, 2 ** bits).
        scales: (G, N) float16.
        zeros: (G, N), any integer dtype, values in [0, 2 ** bits); None in a symmetric scheme. The gptq
            packing cannot store a zero point of 0; like auto-round it then stores 1, unless grids have been made
            storable before, see `quantkit_runtime.rounding.storable_grid`.
        scheme: How to store.

    Returns:
        ``qweight``, ``qzeros`` and ``scales`` as in the module's legend, on the device of ``codes``.

    Raises:
        CheckpointFormatError: Shapes, dtypes or values do not fit the scheme.
    """
    out_features, in_features = codes.shape
    layout = packed_tensors(in_features, out_features, scheme)
    if tuple(scales.shape) != layout["scales"][0] or scales.dtype != torch.float16:
        raise CheckpointFormatError(
            f"scales: {tuple(scales.shape)} {scales.dtype} where {layout['scales'][0]} torch.float16 is expected"
        )
    if zeros is None:
        if not scheme.sym:
            raise CheckpointFormatError("zeros: an asymmetric scheme needs zero points")
        zeros = torch.full(scales.shape, scheme.midpoint, dtype=torch.int32, device=codes.device)
    elif tuple(zeros.shape) != tuple(scales.shape):
        raise CheckpointFormatError(f"zeros: {tuple(zeros.shape)} where {tuple(scales.shape)} is expected")
    offset = least_zero(scheme)
    for name, values, limit in (
        ("codes", codes, scheme.max_code),
        ("zeros", zeros, scheme.max_code + offset),
    ):
        low, high = torch.aminmax(values)
        if int(low) < 0 or int(high) > limit:
            raise CheckpointFormatError(f"{name}: values outside [0, {limit}]")
    zeros = (zeros.to(torch.int32) - offset).clamp_(min=0)
    if _is_awq(scheme):
        zeros = reorder(zeros, _AWQ_STORED_ORDER)
    return {
        "qweight": pack_codes(codes, scheme),
        "qzeros": pack_words(zeros, scheme.bits),
        "scales": scales.contiguous(),
    }


def pack_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Pack codes (N, K) alone, without checks: the ``qweight`` of :func:`pack`."""
    if _is_awq(scheme):
        return pack_words(reorder(codes.t(), _AWQ_STORED_ORDER), scheme.bits)
    return pack_words(codes, scheme.bits).t().contiguous()


def unpack_codes(qweight: Tensor, scheme: Scheme) -> Tensor:
    """Inverse of :func:`pack_codes`: codes (N, K) uint8."""
    per_word = WORD_BITS // scheme.bits if _is_awq(scheme) else 1
    return _unpack_codes(qweight, scheme, slice(0, qweight.shape[1] * per_word))


def unpack(
    tensors: Mapping[str, Tensor], scheme: Scheme, rows: slice | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of :func:`pack`.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales`` of one layer, on one device.
        scheme: How they are stored.
        rows: Only these output features, from a multiple of 32 to a multiple of 32 or the end; None means all.

    Returns:
        codes (N, K) uint8, scales (G, N) float16, zeros (G, N) int32. A zero point of the gptq packing may be
        ``2 ** bits``, one above the largest code.

    Raises:
        CheckpointFormatError: A tensor's shape or dtype does not fit the others.
    """
    _check_packed(tensors, scheme)
    scales = tensors["scales"]
    rows = rows or slice(0, scales.shape[1])
    zeros = unpack_zeros(tensors["qzeros"][:, _words(rows, scheme)], scheme)
    return _unpack_codes(tensors["qweight"], scheme, rows), scales[:, rows], zeros


def unpack_zeros(qzeros: Tensor, scheme: Scheme) -> Tensor:
    """Zero points (G, N) int32 of a stored ``qzeros``."""
    zeros = unpack_words(qzeros, scheme.bits)
    if _is_awq(scheme):
        zeros = reorder(zeros, _AWQ_LOGICAL_ORDER)
    return zeros.to(torch.int32) + least_zero(scheme)


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Weight of one layer as a dense matrix.

    ``scale * (code - zero)`` is exact in float32 (11-bit times 9-bit significands), so the result is rounded
    once, to ``dtype``. auto-round's own kernels multiply in float16 first and round twice.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales`` of one layer, on one device.
        scheme: How they are stored.
        dtype: Floating dtype of the result.

    Returns:
        (N, K) contiguous, as ``torch.nn.Linear.weight``, on the device of the tensors.
    """
    scales, qweight = tensors["scales"], tensors["qweight"]
    groups, out_features = scales.shape
    in_features = qweight.shape[0] if _is_awq(scheme) else qweight.shape[0] * WORD_BITS // scheme.bits
    compute_dtype = torch.promote_types(dtype, torch.float32)
    scale = scales.t().to(compute_dtype).unsqueeze(-1)
    zero = unpack_zeros(tensors["qzeros"], scheme).t().to(compute_dtype).unsqueeze(-1)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=qweight.device)
    step = _block_rows(in_features, out_features, qweight.device)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        codes = _unpack_codes(qweight, scheme, rows)
        block = codes.view(-1, groups, in_features // groups).to(compute_dtype)
        block -= zero[rows]
        block *= scale[rows]
        weight[rows] = block.view(-1, in_features)
    return weight


def _check_packed(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """Check a layer's stored tensors against each other.

    Returns:
        (in_features, out_features), derived from ``qweight`` and ``scales``.

    Raises:
        CheckpointFormatError: A tensor is missing, or its shape or dtype does not fit.
    """
    missing = [suffix for suffix in PACKED_SUFFIXES if suffix not in tensors]
    if missing:
        raise CheckpointFormatError(f"{', '.join(missing)}: missing")
    for suffix in PACKED_SUFFIXES:
        if tensors[suffix].ndim != 2:
            raise CheckpointFormatError(f"{suffix}: {tensors[suffix].ndim} dimensions where 2 are expected")
    rows = tensors["qweight"].shape[0]
    in_features = rows if _is_awq(scheme) else rows * WORD_BITS // scheme.bits
    out_features = tensors["scales"].shape[1]
    for suffix, (shape, dtype) in packed_tensors(in_features, out_features, scheme).items():
        found = tensors[suffix]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise CheckpointFormatError(
                f"{suffix}: {tuple(found.shape)} {found.dtype} where {shape} {dtype} is expected for "
                f"in_features {in_features}, out_features {out_features}, {scheme.bits} bits, group_size "
                f"{scheme.group_size}"
            )
    return in_features, out_features


def _is_awq(scheme: Scheme) -> bool:
    return scheme.packing_format == "auto_round:auto_awq"


def least_zero(scheme: Scheme) -> int:
    """Return the smallest zero point that can be stored; it is subtracted from those that are."""
    return 1 if scheme.packing_format == "auto_round:auto_gptq" else 0


def _block_rows(in_features: int, out_features: int, device: torch.device) -> int:
    """Rows to unpack at once: all on an accelerator, about a cache full on the CPU (six times faster there)."""
    if device.type != "cpu":
        return out_features
    return max(WORD_BITS, _CPU_BLOCK_WEIGHTS // in_features // WORD_BITS * WORD_BITS)


def _unpack_codes(qweight: Tensor, scheme: Scheme, rows: slice) -> Tensor:
    """Codes (rows, K) uint8 of some output features; ``rows`` starts at a multiple of 32."""
    if _is_awq(scheme):
        codes = unpack_words(qweight[:, _words(rows, scheme)], scheme.bits)
        return reorder(codes, _AWQ_LOGICAL_ORDER).t().contiguous()
    return unpack_words(qweight[:, rows].t(), scheme.bits)


def _words(rows: slice, scheme: Scheme) -> slice:
    """Where the codes of some output features are if they are packed along that axis."""
    return slice(rows.start * scheme.bits // WORD_BITS, rows.stop * scheme.bits // WORD_BITS)
