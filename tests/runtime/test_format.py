"""The stored layout, against a decoder that reads it bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.format import (
    PACKING_FORMATS,
    SUPPORTED_BITS,
    Scheme,
    dequantize,
    pack,
    packed_tensors,
    unpack,
)
from quantkit_runtime.rounding import quantize_rtn, rtn_grid

AWQ = "auto_round:auto_awq"
GPTQ = "auto_round:auto_gptq"


def decode(words, bits, awq):
    """Codes of one packed row of int32 words, by arithmetic on one big integer."""
    stream = int.from_bytes(np.asarray(words, dtype="<i4").tobytes(), "little")
    codes = [(stream >> (position * bits)) & (2**bits - 1) for position in range(len(words) * 32 // bits)]
    if not awq:
        return codes
    ordered = [0] * len(codes)
    for position, code in enumerate(codes):
        ordered[position // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[position % 8]] = code
    return ordered


def weight_in_float64(tensors, scheme):
    """(N, K) float64 weight, decoded without the code under test."""
    awq = scheme.packing_format == AWQ
    qweight = tensors["qweight"].numpy()
    rows = qweight if awq else qweight.T
    codes = np.array([decode(row, scheme.bits, awq) for row in rows], dtype=np.float64)
    codes = codes.T if awq else codes
    zeros = np.array([decode(row, scheme.bits, awq) for row in tensors["qzeros"].numpy()], dtype=np.float64)
    zeros = zeros.T + (1 if scheme.packing_format == GPTQ else 0)
    scales = tensors["scales"].numpy().astype(np.float64).T
    length = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat(length, 1)) * scales.repeat(length, 1)


@st.composite
def layers(draw):
    packing = draw(st.sampled_from(PACKING_FORMATS))
    bits = 4 if packing == AWQ else draw(st.sampled_from(SUPPORTED_BITS))
    group_size = draw(st.sampled_from([-1, 16, 32, 96]))
    length = 32 if group_size == -1 else group_size
    in_features = length * draw(st.integers(1, 3)) * (2 if length == 16 else 1)
    out_features = 32 * draw(st.integers(1, 3))
    return in_features, out_features, Scheme(bits, group_size, draw(st.booleans()), "int", packing)


def random_codes(in_features, out_features, scheme, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // scheme.group_length(in_features)
    codes = torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator)
    scales = torch.randn(groups, out_features, generator=generator).to(torch.float16)
    low = 1 if scheme.packing_format == GPTQ else 0
    zeros = torch.randint(low, scheme.max_code + 1, (groups, out_features), generator=generator)
    return codes.to(torch.uint8), scales, None if scheme.sym else zeros.to(torch.int32)


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_unpack_returns_what_pack_stored(layer, seed):
    in_features, out_features, scheme = layer
    codes, scales, zeros = random_codes(in_features, out_features, scheme, seed)
    tensors = pack(codes, scales, zeros, scheme)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == packed_tensors(
        in_features, out_features, scheme
    )
    back_codes, back_scales, back_zeros = unpack(tensors, scheme)
    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scales, scales)
    assert torch.equal(back_zeros, torch.full_like(back_zeros, scheme.midpoint) if zeros is None else zeros)


@settings(max_examples=30, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_any_stored_words_survive_a_round_trip(layer, seed):
    in_features, out_features, scheme = layer
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        if dtype == torch.int32
        else torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in packed_tensors(in_features, out_features, scheme).items()
    }
    again = pack(*unpack(tensors, scheme), scheme)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=30, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_dequantize_is_exact_in_float32_and_rounds_once_below(layer, seed):
    in_features, out_features, scheme = layer
    tensors = pack(*random_codes(in_features, out_features, scheme, seed), scheme)
    expected = torch.from_numpy(weight_in_float64(tensors, scheme))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(tensors, scheme, dtype), expected.to(torch.float32).to(dtype))


def test_a_symmetric_4_bit_gptq_zero_is_stored_as_sevens():
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    tensors = pack(codes, torch.ones(1, 8, dtype=torch.float16), None, Scheme(group_size=32))
    assert tensors["qzeros"].tolist() == [[0x77777777]]


def test_the_gptq_packing_stores_a_zero_point_of_0_as_1_like_auto_round():
    scheme = Scheme(group_size=32, sym=False)
    zeros = torch.zeros(1, 8, dtype=torch.int32)
    tensors = pack(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.float16), zeros, scheme)
    assert unpack(tensors, scheme)[2].unique().tolist() == [1]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rtn_stays_within_half_a_step_of_the_weight(bits, sym, dtype):
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheme = Scheme(bits, 32, sym, "int", "auto_round")
    codes, scales, zeros = quantize_rtn(weight, scheme)
    restored = dequantize(pack(codes, scales, zeros, scheme), scheme, torch.float32)
    error = (restored - weight.float()).abs().view(32, 3, 32).amax(-1)
    # Half a step, plus the rounding of scale and range in the weight's own precision at the range's end.
    slack = (2**bits) * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2**bits * 2**-10
    # The positive end of a symmetric range has one code less: the largest weight may be cut by up to a step.
    assert (error <= scales.t().float().abs() * ((1.0 if sym else 0.5) + slack)).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("lowest", [0.0, -0.01], ids=["no negative weight", "a small one"])
def test_a_zero_point_that_cannot_be_stored_costs_no_more_than_a_coarser_step(bits, lowest):
    weight = torch.rand(32, 96, generator=torch.Generator().manual_seed(0))
    weight[:, ::32] = lowest
    scheme = Scheme(bits, 32, sym=False)
    assert scheme.packing_format == GPTQ
    codes, scales, zeros = quantize_rtn(weight, scheme)
    tensors = pack(codes, scales, zeros, scheme)
    assert torch.equal(unpack(tensors, scheme)[2], zeros)
    error = (dequantize(tensors, scheme, torch.float32) - weight).abs().view(32, 3, 32).amax(-1)
    assert (error <= (0.5 + 2**bits * 2**-10) * scales.t().float()).all()
    assert (scales.float() <= 1.01 * (1 - lowest) / (scheme.max_code - 1)).all()


def rtn_step_by_step(weight, scheme):
    """Return codes, scales and zeros by auto-round's own operations, in its order and its dtypes."""
    grouped = weight.reshape(-1, scheme.group_length(weight.shape[1]))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    floor = 1e-5
    if scheme.sym:
        signed = torch.where(high < -low, 1, -1) * torch.maximum(high, -low)
        scale = (signed / scheme.midpoint).to(torch.float16)
        scale = torch.where(scale < 0, scale.clamp(max=-floor), scale.clamp(min=floor)).unsqueeze(-1)
        levels = (grouped / scale).round().clamp(-scheme.midpoint, scheme.midpoint - 1)
        zero = torch.full_like(scale, scheme.midpoint)
        restored = (levels * scale).to(weight.dtype)
    else:
        scale = ((high - low) / scheme.max_code).to(torch.float16).clamp(min=floor).unsqueeze(-1)
        zero = torch.round(-low.unsqueeze(-1) / scale)
        levels = ((grouped / scale).round() + zero).clamp(0, scheme.max_code)
        restored = (scale * (levels - zero)).to(weight.dtype)
    codes = (restored / scale + zero).round().clamp(0, scheme.max_code).to(torch.uint8)
    rows = len(weight)
    return codes.view(weight.shape), scale.view(rows, -1).t(), zero.view(rows, -1).t().to(torch.int32)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from(SUPPORTED_BITS),
    st.booleans(),
    st.sampled_from(["normal", "tiny", "positive", "heavy", "sparse"]),
    st.integers(0, 2**31),
)
def test_rtn_is_auto_rounds_step_by_step(dtype, bits, sym, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 192, generator=generator)
    if kind == "tiny":
        weight *= 1e-6
    elif kind == "positive":
        weight = weight.abs() * 0.02
    elif kind == "heavy":  # to the end of what a float16 scale can reach
        weight = (weight * torch.exp(2 * torch.randn(64, 192, generator=generator))).clamp(-3e4, 3e4)
    elif kind == "sparse":
        weight *= torch.randint(0, 2, (64, 192), generator=generator)
    weight = weight.to(dtype)
    kept = weight.clone()
    scheme = Scheme(bits, 64, sym, "int", "auto_round")  # which stores every zero point
    codes, scales, zeros = quantize_rtn(weight, scheme)
    expected = rtn_step_by_step(weight, scheme)
    assert torch.equal(weight, kept)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    assert sym or torch.equal(zeros, expected[2])
    grid = rtn_grid(weight, scheme)
    assert torch.equal(grid[0], scales)
    assert (grid[1] is None) if sym else torch.equal(grid[1], zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_symmetric_code_read_back_from_its_weight_is_itself(dtype):
    # quantize_rtn leaves this step of auto-round's out: here for every float16 scale and every level of 8 bits.
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    scales = scales[(scales >= 1e-5) & (scales * 128 <= torch.finfo(torch.float16).max)].unsqueeze(-1)
    for level in range(-128, 128):
        levels = torch.full_like(scales, level, dtype=torch.promote_types(dtype, torch.float16))
        restored = (levels * scales).to(dtype)
        assert torch.equal((restored / scales + 128).round(), levels + 128)


@settings(max_examples=30, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_some_rows_unpack_to_those_rows_of_all(layer, seed):
    in_features, out_features, scheme = layer
    tensors = pack(*random_codes(in_features, out_features, scheme, seed), scheme)
    codes, scales, zeros = unpack(tensors, scheme)
    for start in range(0, out_features, 32):
        rows = slice(start, out_features)
        for part, whole in zip(unpack(tensors, scheme, rows), (codes, scales.t(), zeros.t()), strict=True):
            assert torch.equal(part if part.shape == whole[rows].shape else part.t(), whole[rows])


def test_rtn_of_a_zero_weight_is_zero():
    for sym in (True, False):
        scheme = Scheme(4, 32, sym, "int", "auto_round")
        tensors = pack(*quantize_rtn(torch.zeros(8, 32, dtype=torch.bfloat16), scheme), scheme)
        assert dequantize(tensors, scheme, torch.float32).count_nonzero() == 0


@pytest.mark.parametrize(
    ("in_features", "out_features", "scheme", "message"),
    [
        (100, 32, Scheme(group_size=128), "in_features 100 is not divisible by group_size 128"),
        (64, 32, Scheme(group_size=128), "in_features 64 is not divisible by group_size 128"),
        (128, 12, Scheme(group_size=128), "out_features 12 is not a multiple of 8"),
        (36, 32, Scheme(group_size=-1), "in_features 36 is not a multiple of 8"),
        (48, 32, Scheme(bits=3, group_size=16), "in_features 48 is not a multiple of 32"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(in_features, out_features, scheme, message):
    with pytest.raises(CheckpointFormatError, match=message):
        packed_tensors(in_features, out_features, scheme)


def test_pack_refuses_what_would_spill_into_neighbouring_codes():
    scheme = Scheme(group_size=32)
    scales = torch.ones(1, 8, dtype=torch.float16)
    with pytest.raises(CheckpointFormatError, match=r"codes: values outside \[0, 15\]"):
        pack(torch.full((8, 32), 16), scales, None, scheme)
    with pytest.raises(CheckpointFormatError, match=r"zeros: values outside \[0, 16\]"):
        pack(torch.zeros(8, 32, dtype=torch.int32), scales, torch.full((1, 8), 17), scheme)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scales": torch.ones(2, 8, dtype=torch.float16)},
            r"qzeros: \(1, 1\) torch.int32 where \(2, 1\)|scales",
        ),
        ({"scales": torch.ones(1, 8)}, r"scales: \(1, 8\) torch.float32"),
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, r"qzeros: \(1, 2\)"),
        ({"qweight": torch.zeros(32, dtype=torch.int32)}, "qweight: 1 dimensions"),
        ({"qweight": None}, "qweight: missing"),
    ],
)
def test_unpack_names_the_tensor_that_does_not_fit(change, message):
    scheme = Scheme(group_size=32)
    tensors = pack(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.float16), None, scheme)
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointFormatError, match=message):
        unpack(tensors, scheme)
