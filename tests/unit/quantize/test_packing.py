"""Packed layers give back the very weight that auto-round tuned."""

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.quantize.packing import pack_layers, unpack_layers
from quantkit.quantize.tuning import Layer
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize


def make_model(layer, zeros):
    """A model of one Linear as auto-round leaves it: the weight rounded to bfloat16, scale and zero beside it."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    scale = torch.rand(32, 2, generator=generator).half() + 0.01
    codes = torch.randint(0, 2**layer.bits, (32, 2, 32), generator=generator)
    offsets = zeros.unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
    model[0].weight.data = (scale.float().unsqueeze(-1) * (codes - offsets)).view(32, 64).bfloat16()
    model[0].scale, model[0].zp = scale, zeros
    return model


@pytest.mark.parametrize(
    ("layer", "zeros", "beside"),
    [
        (Layer(4, 32, sym=True), 8, False),
        (Layer(8, 32, sym=True), 128, False),
        (Layer(2, 32, sym=False), torch.full((32, 2), 2.0), False),
        (Layer(2, 32, sym=False), torch.tensor([[0.0, 3.0]]).repeat(32, 1), True),
    ],
    ids=["w4", "w8", "w2-asymmetric", "w2-zero-point-0"],
)
def test_a_layer_comes_back_bit_for_bit(layer, zeros, beside):
    model = make_model(layer, zeros)
    weight = model[0].weight.detach().clone()
    tensors = dict(pack_layers(model, {"0": layer}))
    assert ("0.weight" in tensors) == beside
    assert {"0.qweight", "0.qzeros", "0.scales"} <= tensors.keys()
    model[0].weight.data.zero_()
    unpack_layers(model, {"0": layer}, tensors)
    assert torch.equal(model[0].weight, weight)


def test_a_zero_point_that_cannot_be_stored_moves_no_weight_by_more_than_half_a_step():
    layer = Layer(2, 32, sym=False)
    model = make_model(layer, torch.zeros(32, 2))
    weight = model[0].weight.detach().float()
    tensors = {name.removeprefix("0."): value for name, value in pack_layers(model, {"0": layer})}
    scheme = Scheme(2, 32, sym=False)
    moved = (dequantize(tensors, scheme, torch.float32) - weight).abs().view(32, 2, 32).amax(-1)
    assert (moved <= 0.51 * tensors["scales"].t().float()).all()


def test_a_layer_that_stays_in_16_bit_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    layers = {"0": Layer(16, 32, sym=True)}
    assert dict(pack_layers(model, layers)) == {}
    unpack_layers(model, layers, {})


def test_a_layer_that_auto_round_left_out_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    with pytest.raises(QuantizationError, match="0 was not tuned, against the plan"):
        dict(pack_layers(model, {"0": Layer(4, 32, sym=True)}))
