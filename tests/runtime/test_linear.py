"""W4A16Linear and its backends against a float64 product."""

import copy

import pytest
import torch
from torch import nn

from quantkit_runtime import W4A16Linear
from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError, QuantkitRuntimeError
from quantkit_runtime.format import Scheme, dequantize, pack, unpack
from quantkit_runtime.kernels import LinearSpec, backends, register, resolve, why_not
from quantkit_runtime.kernels.cpu import MAX_INT4_ROWS
from quantkit_runtime.kernels.cpu_int4 import Int4Weight
from quantkit_runtime.rounding import quantize_rtn

K, N = 256, 96


def make_layer(*, bias=True, seed=0, **scheme):
    """A layer with random weights, scales that bf16 cannot hold, and a random bias."""
    generator = torch.Generator().manual_seed(seed)
    layer = W4A16Linear(K, N, bias=bias, **scheme)
    codes, scales, zeros = quantize_rtn(torch.randn(N, K, generator=generator) / K**0.5, layer.scheme)
    state = pack(codes, scales, zeros, layer.scheme)
    if bias:
        state["bias"] = torch.randn(N, generator=generator).to(torch.float16)
    layer.load_state_dict(state)
    return layer


def exact(layer, x):
    """Float64 product."""
    weight = dequantize(layer.packed(), layer.scheme, torch.float64)
    out = x.double() @ weight.t()
    return out if layer.bias is None else out + layer.bias.double()


SCHEMES = [
    {},
    {"group_size": 32},
    {"group_size": -1},
    {"sym": False},
    {"bits": 2, "group_size": 64},
    {"bits": 3, "group_size": 64},
    {"bits": 8},
    {"sym": False, "packing_format": "auto_round:auto_awq"},
    {"sym": False, "packing_format": "auto_round"},
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, MAX_INT4_ROWS, MAX_INT4_ROWS + 1])
def test_a_bf16_product_is_exact_within_bf16_rounding(backend, scheme, rows):
    layer = make_layer(**scheme)
    layer.prepare(torch.bfloat16, backend=backend)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = layer(x)
    assert layer.backend == backend
    assert out.dtype == torch.bfloat16
    # Weight, product and the sum with the bias are each rounded to bf16 (unit roundoff 2**-8) at most once.
    magnitude = x.double().abs() @ dequantize(layer.packed(), layer.scheme, torch.float64).abs().t()
    magnitude += offset_magnitude(layer, x)
    bound = 2.0**-9 * magnitude + 2.0**-8 * (exact(layer, x).abs() + layer.bias.double().abs())
    assert ((out.double() - exact(layer, x)).abs() <= bound).all()
    relative = (out.double() - exact(layer, x)).norm() / exact(layer, x).norm()
    assert relative < 4e-3


def offset_magnitude(layer, x):
    """What the rounding of ``scale * (midpoint - zero)``, which torch's int4 operator wants in bf16, may cost."""
    _, scales, zeros = unpack(layer.packed(), layer.scheme)
    offset = (scales.double() * (layer.scheme.midpoint - zeros)).abs()
    return x.double().abs().unflatten(-1, (len(scales), -1)).sum(-1) @ offset


@pytest.mark.parametrize("group_size", [32, 96, -1])
@pytest.mark.parametrize("sign", ["any", "positive"])
def test_few_rows_of_an_asymmetric_layer_cost_three_bf16_roundings_at_most(group_size, sign):
    layer = W4A16Linear(192, N, bias=False, group_size=group_size, sym=False)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(N, 192, generator=generator), torch.randn(2, 192, generator=generator) + 1
    if sign == "positive":  # zero points at the end of the range: the largest offsets there are
        weight = weight.abs()
    layer.load_state_dict(pack(*quantize_rtn(weight, layer.scheme), layer.scheme))
    x = x.to(torch.bfloat16)
    layer.prepare(torch.bfloat16, backend="cpu")
    few, many = layer(x), layer(x.repeat(MAX_INT4_ROWS, 1))[:2]
    assert not torch.equal(few, many)  # the operator ran: the dense product rounds elsewhere
    # Scale, offset and output: 2 ** -9 each.
    assert (few.double() - exact(layer, x)).norm() / exact(layer, x).norm() < 3 * 2.0**-9


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_other_dtypes_than_the_prepared_one_are_served_in_their_own_precision(backend, dtype, tolerance):
    layer = make_layer()
    layer.prepare(torch.bfloat16, backend=backend)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert (out.double() - exact(layer, x)).norm() / exact(layer, x).norm() < tolerance


@pytest.mark.parametrize("rows", [1, 7])
def test_the_reference_backend_equals_a_dense_linear_bit_for_bit(rows):
    layer = make_layer()
    layer.prepare(torch.bfloat16, backend="reference")
    dense = nn.Linear(K, N, dtype=torch.bfloat16)
    dense.weight.data = dequantize(layer.packed(), layer.scheme, torch.bfloat16)
    dense.bias.data = layer.bias.to(torch.bfloat16)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K), (2, 0, K), (1, 1, 1, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape_gives_what_a_dense_linear_gives(backend, shape, bias):
    layer = make_layer(bias=bias)
    layer.prepare(torch.bfloat16, backend=backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = layer(x)
    assert out.shape == (*shape[:-1], N)
    torch.testing.assert_close(out.double(), exact(layer, x), rtol=0.02, atol=0.02)


def test_rows_that_are_not_contiguous_are_read_correctly():
    layer = make_layer()
    layer.prepare(torch.bfloat16, backend="cpu")
    x = torch.randn(K, 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_state_dict_equals_the_checkpoint_after_preparing_running_and_casting():
    layer = make_layer()
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare(torch.bfloat16, backend="cpu")
    layer(torch.ones(2, K, dtype=torch.bfloat16))
    for cast in (torch.bfloat16, torch.float32, torch.float64):
        layer.to(cast)
        state = layer.state_dict()
        assert list(state) == ["qweight", "qzeros", "scales", "bias"]
        for name, tensor in stored.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)


def test_new_weights_replace_what_the_backend_had_repacked():
    layer, other = make_layer(seed=0), make_layer(seed=1)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    layer.prepare(torch.bfloat16, backend="cpu")
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), other(x))


def test_a_copy_computes_the_same_and_is_independent():
    layer = make_layer()
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    layer.load_state_dict(make_layer(seed=1).state_dict())
    assert torch.equal(twin(x), expected)


def test_a_gradient_is_refused_with_the_way_out():
    layer = make_layer()
    x = torch.ones(1, K, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(QuantkitRuntimeError, match=r"no backward pass; run the model under torch\.inference_mode"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (1, N)


def test_weights_that_were_never_loaded_are_an_error_not_garbage():
    layer = W4A16Linear(K, N, device="meta")
    with pytest.raises(CheckpointFormatError, match="never loaded"):
        layer.prepare()


def test_the_reference_forward_is_captured_without_a_graph_break():
    layer = make_layer()
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for backend in ("reference", "cpu"):
        layer.prepare(torch.bfloat16, backend=backend)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_the_cpu_backend_works_through_inductor_for_few_and_many_rows():
    layer = make_layer()
    layer.prepare(torch.bfloat16, backend="cpu")
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (1, MAX_INT4_ROWS + 1):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        torch.testing.assert_close(compiled(x).double(), exact(layer, x), rtol=0.02, atol=0.02)


def spec(**changes):
    values = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "compute": "16bit", **changes}
    return LinearSpec(K, N, Scheme(), **values)


def test_the_cpu_backend_is_chosen_on_the_cpu_and_the_reference_elsewhere():
    assert resolve("linear", spec()).name == "cpu"
    assert resolve("linear", spec(device=torch.device("mps"))).name == "reference"


def test_the_reference_is_the_last_choice():
    assert [backend.name for backend in backends("linear")][-1] == "reference"


def test_a_backend_says_why_it_cannot_run():
    elsewhere = spec(device=torch.device("cuda"))
    assert why_not("linear", "cpu", spec()) is None
    assert why_not("linear", "cpu", elsewhere) == "it needs the weights on the CPU, they are on cuda"
    with pytest.raises(BackendUnavailableError, match="backend 'cpu' cannot run here: it needs the weights on"):
        resolve("linear", elsewhere, "cpu")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"backend": "marlin"}, "backend 'marlin' does not exist; use 'auto' or one of: .*cpu, reference"),
        ({"compute": "fp8"}, "no backend serves linear with compute 'fp8' on cpu"),
        ({"compute": "int3"}, "compute 'int3' does not exist"),
    ],
)
def test_impossible_requests_are_refused_by_name(request_, message):
    with pytest.raises(BackendUnavailableError, match=message):
        make_layer().prepare(**request_)


def test_a_backend_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="already registered"):
        register("linear", "cpu", priority=99, requirement=lambda _: None)(lambda *_: None)


@pytest.mark.parametrize("out_features", [16, 48, 256, 272, 1040])
def test_codes_are_packed_in_parts_as_the_operator_packs_them_whole(out_features):
    scheme = Scheme()
    codes = torch.randint(0, 16, (out_features, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = pack(codes, torch.ones(1, out_features, dtype=torch.float16), None, scheme)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(Int4Weight.from_packed(tensors, scheme).codes, whole)
