"""The XPU backend without an XPU: what it accepts, what it repacks, what it calls.

The operator is stood in for by its documented arithmetic, registered with torch under its own name, so that its
real schema is what the arguments have to fit.
"""

import pytest
import torch

from quantkit_runtime import W4A16Linear
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack, unpack
from quantkit_runtime.kernels import LinearSpec, resolve, why_not
from quantkit_runtime.kernels.xpu import MAX_INT4_ROWS, NAME, prepare, repack
from quantkit_runtime.rounding import quantize_rtn

K, N = 256, 48
SCHEMES = [
    Scheme(),
    Scheme(group_size=-1),
    Scheme(group_size=32, sym=False),
    Scheme(sym=False, packing_format="auto_round:auto_awq"),
    Scheme(sym=False, packing_format="auto_round"),
]


def stand_in(x, weight, group, scales, zeros):
    """What the operator computes, after the checks that torch's XPU code makes."""
    assert x.ndim == 2
    assert x.is_contiguous()
    assert weight.dtype == torch.int32
    assert weight.is_contiguous()
    assert zeros.dtype == torch.int8
    assert scales.dtype == x.dtype
    assert group > 1
    assert group % 32 == 0
    assert scales.shape == zeros.shape == (x.shape[1] // group, len(weight))
    assert scales.is_contiguous()
    assert zeros.is_contiguous()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (weight.unsqueeze(-1) >> shifts & 15).flatten(1).double()
    steps, offsets = (tensor.double().t().repeat_interleave(group, dim=1) for tensor in (scales, zeros))
    return (x.double() @ (steps * (codes - offsets)).t()).to(x.dtype)


@pytest.fixture
def operator():
    """Register the stand-in for the CPU, where the tensors of these tests are, and for XPU."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("CPU", "XPU"):
        library.impl("_weight_int4pack_mm_with_scales_and_zeros", stand_in, key)
    yield
    library._destroy()


def make(scheme, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    return pack(*quantize_rtn(weight, scheme), scheme)


def spec(scheme=SCHEMES[0], **changes):
    values = {"device": torch.device("xpu"), "dtype": torch.bfloat16, **changes}
    return LinearSpec(K, N, scheme, **values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_repacked_stands_for_the_same_weight(scheme):
    tensors = make(scheme)
    codes, scales, zeros = repack(tensors, scheme, torch.float16)
    wanted_codes, wanted_scales, wanted_zeros = unpack(tensors, scheme)
    nibbles = codes.contiguous().view(torch.uint8)  # two codes a byte, the first in the low half
    assert torch.equal(torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1), wanted_codes)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(zeros.int(), wanted_zeros)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (MAX_INT4_ROWS, K)], ids=str)
def test_few_rows_give_the_product_with_the_dequantized_weight(scheme, dtype, shape):
    tensors = make(scheme)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    kernel = prepare(spec(scheme, dtype=dtype), tensors, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ dequantize(tensors, scheme, torch.float64).t() + bias.double()
    out = kernel(x)
    assert out.dtype == dtype
    assert out.shape == (*shape[:-1], N)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, K), torch.bfloat16), ((MAX_INT4_ROWS + 1, K), torch.bfloat16), ((2, K), torch.float32)],
)
def test_many_rows_no_rows_and_other_dtypes_take_the_next_best_backend(shape, dtype):
    # The operator is absent here: calling it would raise.
    tensors = make(SCHEMES[0])
    kernel = prepare(spec(), tensors, None)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.nn.functional.linear(x, dequantize(tensors, SCHEMES[0], dtype))
    assert torch.equal(kernel(x), wanted)


@pytest.mark.usefixtures("operator")
def test_the_kernel_is_captured_without_a_graph_break():
    kernel = prepare(spec(), make(SCHEMES[0]), None)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(torch.compile(kernel, backend="eager", fullgraph=True)(x), kernel(x))


@pytest.mark.usefixtures("operator")
def test_scales_that_need_no_cast_are_shared_and_not_counted():
    tensors = make(SCHEMES[0])
    in_fp16 = prepare(spec(dtype=torch.float16), tensors, None)
    in_bf16 = prepare(spec(), tensors, None)
    assert in_bf16.extra_bytes - in_fp16.extra_bytes == tensors["scales"].nbytes


@pytest.mark.usefixtures("operator")
def test_it_is_chosen_on_an_xpu_without_triton_where_it_fits_and_only_there(monkeypatch):
    assert resolve("linear", spec()).name == "triton"  # which keeps nothing beside the weight
    monkeypatch.setattr("quantkit_runtime.kernels.accelerator._has_triton", lambda: False)
    assert resolve("linear", spec()).name == NAME
    assert resolve("linear", spec(), NAME).name == NAME
    assert resolve("linear", spec(Scheme(bits=8))).name == "reference"
    assert resolve("linear", spec(device=torch.device("cpu"))).name == "cpu"


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda")}, "it needs the weights on an XPU, they are on cuda"),
        ({"compute": "fp8"}, "it computes in 16 bit, not in fp8"),
        ({"dtype": torch.float32}, "it computes in bfloat16 or float16, not in float32"),
        ({"scheme": Scheme(bits=8)}, "it reads 4-bit weights, not 8-bit ones"),
        ({"scheme": Scheme(group_size=16)}, "it needs groups of a multiple of 32 features, not of 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_with_the_reason(changes, reason):
    assert why_not("linear", NAME, spec(**changes)) == reason


def test_a_torch_without_the_operator_is_told(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert "has no _weight_int4pack_mm_with_scales_and_zeros for XPU" in why_not("linear", NAME, spec())


@pytest.mark.usefixtures("operator")
def test_weights_on_another_than_the_current_device_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert why_not("linear", NAME, spec(device=torch.device("xpu", 0))) is None
    assert "set_device_index(1) before loading" in why_not("linear", NAME, spec(device=torch.device("xpu", 1)))


def test_on_this_machine_a_layer_says_why_not():
    layer = W4A16Linear(K, N)
    assert "needs the weights on an XPU" in why_not(
        "linear", NAME, LinearSpec(K, N, layer.scheme, layer.qweight.device, torch.bfloat16)
    )
