"""Packed layers on an accelerator, against float64 on the CPU."""

import pytest
import torch

from quantkit_runtime import W4A16Linear
from quantkit_runtime.format import SUPPORTED_BITS, Scheme, dequantize, pack, unpack
from quantkit_runtime.rounding import quantize_rtn

pytestmark = pytest.mark.gpu

SHAPES = [(128, 64), (256, 1024), (3072, 3072), (3072, 12288)]


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return torch.accelerator.current_accelerator()


def random_layer(in_features, out_features, **scheme):
    generator = torch.Generator().manual_seed(in_features + out_features)
    layer = W4A16Linear(in_features, out_features, **scheme)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    state = pack(*quantize_rtn(weight, layer.scheme), layer.scheme)
    state["bias"] = torch.randn(out_features, generator=generator).to(torch.float16)
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_unpacking_on_the_device_gives_the_bits_of_the_cpu(device, packing, bits, sym):
    if packing == "auto_round:auto_awq" and bits != 4:
        pytest.skip("this packing has 4 bits only")
    scheme = Scheme(bits, 32, sym, "int", packing)
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    tensors = pack(*quantize_rtn(weight, scheme), scheme)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    for here, there in zip(unpack(tensors, scheme), unpack(moved, scheme), strict=True):
        assert torch.equal(here, there.cpu())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(tensors, scheme, dtype), dequantize(moved, scheme, dtype).cpu())
    repacked = pack(*unpack(moved, scheme), scheme)
    assert all(torch.equal(tensor, repacked[name].cpu()) for name, tensor in tensors.items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)], ids=str
)
def test_the_product_on_the_device_is_exact_within_rounding(device, shape, rows, dtype, tolerance):
    layer = random_layer(*shape)
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = dequantize(layer.packed(), layer.scheme, torch.float64)
    exact = x.double() @ weight.t() + layer.bias.double()
    layer.to(device).prepare(dtype)
    out = layer(x.to(device))
    assert out.dtype == dtype
    assert ((out.cpu().double() - exact).norm() / exact.norm()).item() < tolerance


def test_moving_to_the_device_and_back_keeps_every_bit_and_chooses_the_backend_anew(device):
    layer = random_layer(256, 128)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    before = layer(x)
    assert layer.backend == "cpu"
    layer.to(device, torch.bfloat16)
    assert layer(x.to(device)).device.type == device.type
    assert layer.backend != "cpu"
    layer.to("cpu")
    assert torch.equal(layer(x), before)
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (256,), (2, 3, 256)], ids=str)
def test_any_leading_shape_works_on_the_device(device, shape):
    layer = random_layer(256, 128).to(device)
    assert layer(torch.ones(shape, dtype=torch.bfloat16, device=device)).shape == (*shape[:-1], 128)


def test_compiling_the_layer_breaks_no_graph(device):
    layer = random_layer(256, 128).to(device)
    layer.prepare(torch.bfloat16)
    x = torch.randn(16, 256, dtype=torch.bfloat16, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
