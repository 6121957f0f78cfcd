"""The Triton kernels, run by Triton's interpreter on the CPU, against float64."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantkit_runtime import W4A16Experts, W4A16Linear
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.rounding import quantize_rtn

if os.environ.get("TRITON_INTERPRET") != "1":
    # It must be set before triton is imported, and would make the CPU take these kernels in other tests.
    pytest.skip("run with TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

# The interpreter cuts float32 to bf16 instead of rounding it, so bf16 is compared on accelerators (tests/gpu).
DTYPE, TOLERANCE = torch.float16, 2e-3


def make_layer(in_features, out_features, *, bias=True, seed=0, **scheme):
    generator = torch.Generator().manual_seed(seed)
    layer = W4A16Linear(in_features, out_features, bias=bias, **scheme)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    state = pack(*quantize_rtn(weight, layer.scheme), layer.scheme)
    if bias:
        state["bias"] = torch.randn(out_features, generator=generator).to(torch.float16)
    layer.load_state_dict(state)
    return layer, state


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def exact_product(state, layer, x):
    weight = dequantize(state, layer.scheme, torch.float64)
    return x.double() @ weight.t() + (0 if layer.bias is None else layer.bias.double())


SCHEMES = [
    {},
    {"group_size": 32},
    {"group_size": 64},
    {"group_size": -1},
    {"group_size": 256},
    {"sym": False},
    {"sym": False, "group_size": 32, "packing_format": "auto_round:auto_awq"},
    {"sym": False, "group_size": -1, "packing_format": "auto_round"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_few_rows_give_the_exact_product_within_rounding(scheme, rows):
    layer, state = make_layer(768, 136, **scheme)
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    assert relative_error(layer(x), exact_product(state, layer, x)) < TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_many_rows_are_multiplied_with_the_very_weight(scheme, monkeypatch):
    monkeypatch.setattr("quantkit_runtime.kernels.accelerator.fused_rows", lambda _: 4)
    layer, state = make_layer(512, 40, **scheme)
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    dense = nn.functional.linear(x, dequantize(state, layer.scheme, DTYPE), layer.bias)
    assert torch.equal(layer(x), dense)


@pytest.mark.parametrize("in_features", [32, 160, 224, 416])
@pytest.mark.parametrize(("out_features", "group_size"), [(8, 32), (120, -1), (264, 32)])
def test_features_that_fill_no_tile_are_neither_missed_nor_made_up(in_features, out_features, group_size):
    layer, state = make_layer(in_features, out_features, group_size=group_size)
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    assert relative_error(layer(x), exact_product(state, layer, x)) < TOLERANCE
    assert torch.equal(
        torch.ops.quantkit.unpack(
            layer.qweight, layer.scales, None, max(group_size, 0), in_features, torch.float32
        ),
        dequantize(state, layer.scheme, torch.float32),
    )


@pytest.mark.parametrize("rows", [2, 130])
def test_several_blocks_of_rows_and_shares_of_k_give_the_same(rows):
    layer, state = make_layer(
        1536, 128
    )  # one part of N, so that K is shared by 4 programs where rows fit one block
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(rows, 1536, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    assert relative_error(layer(x), exact_product(state, layer, x)) < TOLERANCE
    assert torch.equal(layer(x), layer(x))
    assert not layer._kernel._counters.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_served_in_their_own_precision(dtype):
    layer, state = make_layer(256, 48, sym=False)
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(3, 256, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out = layer(x)
    assert out.dtype == dtype
    assert relative_error(out, exact_product(state, layer, x)) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (0, 256), (2, 0, 256)], ids=str)
def test_any_leading_shape_is_kept(shape):
    layer, state = make_layer(256, 48, bias=False)
    layer.prepare(DTYPE, backend="triton")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    out = layer(x)
    assert out.shape == (*shape[:-1], 48)
    torch.testing.assert_close(out.double(), exact_product(state, layer, x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"])
def test_a_layer_in_use_gives_the_checkpoints_tensors_back_and_takes_new_ones(packing):
    layer, state = make_layer(160, 48, sym=False, group_size=32, packing_format=packing)
    x = torch.randn(2, 160, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    layer.prepare(DTYPE, backend="triton")
    before = layer(x)
    assert layer.qweight.shape != state["qweight"].shape
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(layer.packed()[name], state[name]) for name in layer.packed())
    other, other_state = make_layer(160, 48, sym=False, group_size=32, packing_format=packing, seed=3)
    layer.load_state_dict(other_state)
    layer.prepare(DTYPE, backend="triton")
    other.prepare(DTYPE, backend="triton")
    assert torch.equal(layer(x), other(x))
    layer.load_state_dict(state)
    layer.prepare(DTYPE, backend="reference")
    torch.testing.assert_close(layer(x), before, rtol=0.01, atol=0.01)
    assert torch.equal(layer.qweight, state["qweight"])


def test_the_compiler_takes_the_operators_as_they_are():
    layer, _ = make_layer(256, 48)
    layer.prepare(DTYPE, backend="triton")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for rows in (1, 200):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(DTYPE)
        assert torch.equal(compiled(x), layer(x))
    kernel = layer._kernel
    arguments = (*kernel._weight.arguments, layer.bias, kernel._counters, 128, 16)
    torch.library.opcheck(torch.ops.quantkit.linear, (x, *arguments), test_utils="test_schema")
    torch.library.opcheck(torch.ops.quantkit.linear, (x, *arguments), test_utils="test_faketensor")


def test_rows_are_quantized_alike_in_the_kernel_and_in_the_compilers_operations():
    from quantkit_runtime.kernels.accelerator import _quantize_rows

    # Values that e4m3 holds, times a power of two: the interpreter's rounding to e4m3 loses carries.
    generator = torch.Generator().manual_seed(1)
    held = (torch.rand(3, 200, generator=generator) * 400).to(torch.float8_e4m3fn).float()
    held[:, 7] = 448
    x = (held * torch.tensor([[0.25], [1.0], [32.0]])).to(torch.bfloat16)
    for quantize in (torch.ops.quantkit.quantize_rows, _quantize_rows):
        values, scales = quantize(x)
        assert torch.equal(scales, torch.tensor([[0.25], [1.0], [32.0]]))
        assert torch.equal(values.float(), held)


EXPERTS, HIDDEN, INNER, TOP_K = 4, 128, 64, 2


def make_experts(scheme, activation=functional.silu):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    state = {}
    for expert in range(EXPERTS):
        for name, shape in shapes.items():
            tensors = pack(*quantize_rtn(torch.randn(shape, generator=generator) / 16, scheme), scheme)
            state |= {f"{expert}.{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    layer = W4A16Experts(EXPERTS, HIDDEN, INNER, scheme=scheme, activation=activation)
    layer.load_state_dict(state)
    return layer, state


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        (Scheme(4, 64, True), functional.silu),
        (Scheme(4, 32, False), functional.gelu),
        (Scheme(4, -1, True), functional.silu),
    ],
    ids=["groups of 64, silu", "asymmetric, gelu", "one group, silu"],
)
@pytest.mark.parametrize("tokens", [1, 70])
def test_experts_give_what_the_reference_gives(scheme, activation, tokens):
    layer, state = make_experts(scheme, activation)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(DTYPE)
    weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    index[0, 0] = EXPERTS  # sent nowhere
    layer.prepare(torch.float64, backend="reference")
    exact = layer(x.double(), index, weights.double())
    layer.prepare(DTYPE, backend="triton")
    out = layer(x, index, weights.to(DTYPE))
    assert out.dtype == DTYPE
    assert relative_error(out, exact) < 4e-3
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())


def test_every_slot_is_routed_to_its_expert_and_no_block_holds_two_experts():
    from quantkit_runtime.kernels.accelerator import route

    index = torch.randint(0, 9, (200, 3), generator=torch.Generator().manual_seed(0))  # 8 experts, 8 is nowhere
    order, expert, start, rows = route(index, 8)
    blocks = len(expert)
    seen = []
    for block in range(blocks):
        if expert[block] < 8:
            end = min(int(start[block]) + rows, int(start[blocks + expert[block]]))
            held = order[int(start[block]) : end].tolist()
            assert held
            assert {int(index.view(-1)[slot]) for slot in held} == {int(expert[block])}
            seen += held
    assert sorted(seen) == torch.where(index.view(-1) < 8)[0].tolist()


def test_the_border_is_the_last_number_of_rows_at_which_the_fused_kernel_is_no_slower(monkeypatch):
    from quantkit_runtime.kernels import crossover

    times = iter([1.0, 2.0, 2.0, 2.0, 4.0, 3.0])  # fused, unpacked; of 2, 4 and 8 rows
    seen = []

    def time_ms(run, _device):
        run()
        return next(times)

    monkeypatch.setattr(crossover, "_time_ms", time_ms)
    found = crossover.measure(
        torch.device("cpu"),
        shapes=[(128, 64)],
        rows=[2, 4, 8, 16],
        dtype=DTYPE,
        on_progress=lambda *now: seen.append(now),
    )
    assert found == 4
    assert seen == [(2, 1.0, 2.0), (4, 2.0, 2.0), (8, 4.0, 3.0)]
