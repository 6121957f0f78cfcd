"""What ranks take of a stored layer: together, and in order, it is the whole layer."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.parallel.cuts import Cut
from quantkit_runtime.parallel.share import Share
from quantkit_runtime.rounding import quantize_rtn

SCHEMES = {
    "gptq": Scheme(group_size=32),
    "plain": Scheme(group_size=32, sym=False, packing_format="auto_round"),
    "awq": Scheme(group_size=32, sym=False, packing_format="auto_round:auto_awq"),
    "3 bits": Scheme(bits=3, group_size=32),
    "2 bits": Scheme(bits=2, group_size=64),
    "8 bits, one group": Scheme(bits=8, group_size=-1),
}
RANKS = 2
PARTS = {"whole": (1,), "two tensors side by side": (1, 3)}


def shares(style, features, proportions, scheme):
    parts = tuple(features * part // sum(proportions) for part in proportions)
    cut = Cut("layer", "features", style, parts)
    return [Share(style, cut.spans(RANKS, rank), features, scheme, rank == 0) for rank in range(RANKS)]


def take(path, share):
    with safe_open(path, framework="pt") as file:
        return {name: share.take(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 - no mapping


def expected(weight, style, proportions):
    """Return what each rank should have of a dense weight (N, K)."""
    axis = 1 if style == "row" else 0
    unit = weight.shape[axis] // sum(proportions)
    parts = weight.split([unit * part for part in proportions], dim=axis)
    return [torch.cat([part.chunk(RANKS, dim=axis)[rank] for part in parts], dim=axis) for rank in range(RANKS)]


@pytest.mark.parametrize("style", ["column", "gathered", "row"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_parts_of_a_packed_layer_are_packed_layers(tmp_path, name, parts, style):
    scheme, path = SCHEMES[name], tmp_path / "layer.safetensors"
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    stored = pack(*quantize_rtn(weight, scheme), scheme)
    save_file({**stored, "bias": torch.arange(256.0)}, path)
    whole = dequantize(stored, scheme, torch.float32)
    features = 512 if style == "row" else 256
    found = [take(path, share) for share in shares(style, features, PARTS[parts], scheme)]
    for taken, wanted in zip(found, expected(whole, style, PARTS[parts]), strict=True):
        assert torch.equal(dequantize(taken, scheme, torch.float32), wanted)
        assert all(tensor.is_contiguous() for tensor in taken.values())
    if style == "row":
        assert torch.equal(found[0]["bias"], torch.arange(256.0))
        assert not found[1]["bias"].any()
    else:
        bias = torch.arange(256.0).unsqueeze(1)
        for taken, wanted in zip(found, expected(bias, style, PARTS[parts]), strict=True):
            assert torch.equal(taken["bias"], wanted[:, 0])


@pytest.mark.parametrize("style", ["column", "gathered", "row"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_parts_of_a_layer_in_16_bit_are_slices(tmp_path, parts, style):
    path = tmp_path / "layer.safetensors"
    weight = torch.randn(64, 128)
    save_file({"weight": weight}, path)
    found = [take(path, share) for share in shares(style, weight.shape[style == "row"], PARTS[parts], None)]
    for taken, wanted in zip(found, expected(weight, style, PARTS[parts]), strict=True):
        assert torch.equal(taken["weight"], wanted)


def test_sizes_that_fit_are_whole_pieces_of_whole_units():
    cut = Cut("layer", "in_features", "row", (3072, 12288), unit=128)
    assert [ranks for ranks in range(1, 10) if cut.fits(ranks)] == [1, 2, 3, 4, 6, 8]
    assert cut.spans(2, 1) == ((1536, 3072), (9216, 15360))
