"""The Triton kernels on an accelerator, against float64, over a grid of shapes, dtypes and schemes."""

import pytest
import torch
from torch.nn import functional

from quantkit_runtime import W4A16Experts, W4A16Linear
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.kernels import hopper_launch
from quantkit_runtime.kernels.accelerator import _quantize_rows
from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.rounding import quantize_rtn

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return torch.accelerator.current_accelerator()


def make_layer(device, in_features, out_features, *, seed=0, **scheme):
    generator = torch.Generator(device).manual_seed(seed)
    layer = W4A16Linear(in_features, out_features, device=device, **scheme)
    weight = torch.randn(out_features, in_features, generator=generator, device=device) / in_features**0.5
    state = pack(*quantize_rtn(weight, layer.scheme), layer.scheme)
    state["bias"] = torch.randn(out_features, generator=generator, device=device).to(torch.float16)
    layer.load_state_dict(state)
    return layer, state


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def exact_product(state, layer, x):
    return x.double() @ dequantize(state, layer.scheme, torch.float64).t() + state["bias"].double()


SHAPES = [(128, 8), (160, 24), (1472, 136), (256, 1024), (3072, 3072), (3072, 12288), (13824, 5120)]
ROWS = [1, 2, 8, 9, 16, 33, 64, 65, 127, 200, 513, 2500]
SCHEMES = [
    {"group_size": 32},
    {"group_size": 64},
    {"group_size": 128},
    {"group_size": -1},
    {"group_size": 32, "sym": False},
    {"group_size": 128, "sym": False, "packing_format": "auto_round:auto_awq"},
]


def fits(shape, scheme):
    return shape[0] % (shape[0] if scheme["group_size"] == -1 else scheme["group_size"]) == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_rows_gives_the_exact_product_within_rounding(device, shape, scheme, dtype):
    if not fits(shape, scheme):
        pytest.skip("groups do not fit")
    layer, state = make_layer(device, *shape, seed=sum(shape), **scheme)
    layer.prepare(dtype)
    assert layer.backend == "triton"
    weights = layer._kernel._weight
    for rows in ROWS:
        x = torch.randn(rows, shape[0], generator=torch.Generator(device).manual_seed(rows), device=device).to(
            dtype
        )
        exact = exact_product(state, layer, x)
        for fused_rows in (1 << 30, 0):
            out = torch.ops.quantkit.linear(
                x, *weights.arguments, state["bias"].to(dtype), layer._kernel._counters, weights.group, fused_rows
            )
            assert relative_error(out, exact) < TOLERANCE[dtype], (rows, fused_rows)
        assert relative_error(layer(x), exact) < TOLERANCE[dtype]
    assert not layer._kernel._counters.any()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_however_parts_are_shared_among_programs_the_product_is_exact_and_the_same_each_time(device, block, sym):
    if not hopper_launch.runs_on(device):
        pytest.skip("no Hopper GPU")
    layer, state = make_layer(device, 1024, 3080, group_size=128, sym=sym)
    layer.prepare(torch.bfloat16)
    weights, flags = layer._kernel._weight, layer._kernel._counters
    bias = state["bias"].to(torch.bfloat16)
    count = multiprocessors(device)
    for rows in (1, 200, 700, 2500):
        x = torch.randn(rows, 1024, generator=torch.Generator(device).manual_seed(rows), device=device).bfloat16()
        exact = exact_product(state, layer, x)
        found = list(hopper_launch.plans(block, rows, 3080, 8, count, count))
        for plan in found:
            out, *again = (
                hopper_launch.multiply(x, *weights.arguments, bias, flags, weights.group, plan) for _ in range(4)
            )
            assert relative_error(out, exact) < TOLERANCE[torch.bfloat16], plan
            assert all(torch.equal(out, other) for other in again), plan
    assert not flags.any()


def test_a_hundred_thousand_rows_and_none_are_served(device):
    layer, state = make_layer(device, 256, 512)
    layer.prepare(torch.bfloat16)
    x = torch.randn(100_000, 256, device=device).to(torch.bfloat16)
    assert relative_error(layer(x)[-100:], exact_product(state, layer, x[-100:])) < 4e-3
    assert layer(x[:0]).shape == (0, 512)


def test_rows_may_begin_at_any_address(device):
    layer, state = make_layer(device, 256, 512)
    layer.prepare(torch.bfloat16)
    x = torch.randn(70 * 256 + 1, device=device).to(torch.bfloat16)[1:].view(70, 256)
    assert relative_error(layer(x), exact_product(state, layer, x)) < 4e-3


@pytest.mark.parametrize("scheme", [{}, {"sym": False}, {"group_size": -1}], ids=str)
@pytest.mark.parametrize("rows", [3, 300, 4608])
def test_fp8_compute_adds_little_to_the_error_of_four_bits(device, scheme, rows):
    layer, state = make_layer(device, 3072, 3072, **scheme)
    layer.prepare(torch.bfloat16, compute="fp8")
    assert layer.backend == "triton-fp8"
    x = torch.randn(rows, 3072, generator=torch.Generator(device).manual_seed(1), device=device).to(torch.bfloat16)
    x[:, 5] *= 20  # an outlier channel
    exact = exact_product(state, layer, x)
    assert relative_error(layer(x), exact) < (4e-3 if rows == 3 else 0.05)


def test_rows_are_quantized_to_the_nearest_value_in_the_kernel_as_in_the_compilers_operations(device):
    x = torch.randn(70, 3000, device=device).to(torch.bfloat16) * 30
    values, scales = torch.ops.quantkit.quantize_rows(x)
    plain, plain_scales = _quantize_rows(x)
    torch.testing.assert_close(scales, plain_scales)
    assert (values.float() != plain.float()).float().mean() < 1e-3  # the order of two products may round otherwise
    assert ((values.float() * scales - x.float()).abs() <= x.float().abs() * 2**-4 + scales * 2**-10).all()


@pytest.mark.parametrize("compute", ["16bit", "fp8"])
def test_compiled_and_captured_layers_give_what_the_eager_layer_gives(device, compute):
    layer, _ = make_layer(device, 512, 1024)
    layer.prepare(torch.bfloat16, compute=compute)
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (1, 40, 1000):
        x = torch.randn(rows, 512, device=device).to(torch.bfloat16)
        out = layer(x)
        torch.testing.assert_close(compiled(x), out, rtol=0.05, atol=0.05)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        captured.zero_()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, out)


EXPERTS, HIDDEN, INNER, TOP_K = 16, 512, 256, 4
SCHEMES_OF_EXPERTS = [Scheme(4, 128, True), Scheme(4, 128, False), Scheme(4, 32, False), Scheme(4, -1, True)]


def make_experts(device, scheme):
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    state = {}
    for expert in range(EXPERTS):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator, device=device) / 16
            tensors = pack(*quantize_rtn(weight, scheme), scheme)
            state |= {f"{expert}.{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    layer = W4A16Experts(EXPERTS, HIDDEN, INNER, scheme=scheme, activation=functional.silu, device=device)
    layer.load_state_dict(state)
    return layer, state


@pytest.mark.parametrize("scheme", SCHEMES_OF_EXPERTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_experts_give_the_exact_sum_for_one_token_and_for_thousands(device, scheme, dtype):
    layer, state = make_experts(device, scheme)
    for tokens in (1, 7, 32, 33, 200, 500, 4000):
        generator = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, HIDDEN, generator=generator, device=device).to(dtype)
        scores = torch.rand(tokens, EXPERTS, generator=generator, device=device)
        weights, index = scores.topk(TOP_K)
        index[0, 0] = EXPERTS
        layer.prepare(torch.float64, backend="reference")
        exact = layer(x.double(), index, weights.double())
        layer.prepare(dtype)
        assert layer.backend == "triton"
        out = layer(x, index, weights.to(dtype))
        assert relative_error(out, exact) < 3 * TOLERANCE[dtype]
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())


@torch.inference_mode()
def test_experts_are_captured_in_a_graph_for_few_and_many_tokens(device):
    layer, _ = make_experts(device, Scheme(4, 128, True))
    layer.prepare(torch.bfloat16)
    for tokens in (2, 300):
        x = torch.randn(tokens, HIDDEN, device=device).to(torch.bfloat16)
        weights, index = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K)
        out = layer(x, index, weights.to(torch.bfloat16))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x, index, weights.to(torch.bfloat16))
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, out)


@torch.inference_mode()
def test_a_layer_on_another_accelerator_than_the_current_one_is_computed_there(device):
    if torch.accelerator.device_count() < 2:
        pytest.skip("one accelerator")
    other = torch.device(device.type, 1)
    assert torch.accelerator.current_device_index() == 0
    layer, state = make_layer(other, 256, 1024, group_size=128)
    layer.prepare(torch.bfloat16)
    for rows in (1, 64, 2500):
        x = torch.randn(rows, 256, device=other, dtype=torch.bfloat16)
        out = layer(x)
        assert out.device == other
        assert relative_error(out, exact_product(state, layer, x)) < TOLERANCE[torch.bfloat16]
