"""Every kernel once on inputs so small that a memory checker has soon looked at each access.

::

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -m pytest tests/gpu/test_bounds_gpu.py -p no:xdist

Without torch's caching allocator every tensor is an allocation of its own, beyond which nothing may be touched.
What is computed is compared with the CPU.
"""

import pytest
import torch
from torch.nn.functional import silu

from quantkit_runtime import W4A16Experts, W4A16Linear
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import pack
from quantkit_runtime.kernels import hopper_launch, launch
from quantkit_runtime.kernels.device import multiprocessors
from quantkit_runtime.rounding import quantize_rtn

pytestmark = pytest.mark.gpu

SCHEMES = [{"group_size": 128}, {"group_size": 128, "sym": False}, {"group_size": -1}, {"group_size": 32}]


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return torch.accelerator.current_accelerator()


def packed(out_features, in_features, scheme, seed):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return pack(*quantize_rtn(weight / in_features**0.5, scheme), scheme)


def pair(device, in_features, out_features, *, compute="16bit", **options):
    """Return the same layer on the CPU and, prepared, on the device."""
    layers = []
    for place in ("cpu", device):
        layer = W4A16Linear(in_features, out_features, device=place, **options)
        state = packed(out_features, in_features, layer.scheme, in_features + out_features)
        state["bias"] = torch.randn(out_features, generator=torch.Generator().manual_seed(1)).to(torch.float16)
        layer.load_state_dict(state)
        layers.append(layer)
    layers[0].prepare(torch.float32, backend="reference")
    layers[1].prepare(torch.bfloat16, compute=compute)
    return layers


def rows_of(count, features):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(count)).bfloat16()


def close(found, expected, tolerance=1e-2):
    error = (found.cpu().float() - expected).norm() / expected.norm()
    return error < tolerance


@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(160, 24), (256, 136), (384, 264)], ids=str)
def test_linear_layers_of_few_and_many_rows(device, shape, scheme):
    if shape[0] % (shape[0] if scheme["group_size"] == -1 else scheme["group_size"]):
        pytest.skip("groups do not fit")
    here, there = pair(device, *shape, **scheme)
    for count in (1, 5, 16, 31, 65, 200):
        x = rows_of(count, shape[0])
        assert close(there(x.to(device)), here(x.float()))
    weights = there._kernel._weight
    for dtype in (torch.bfloat16, torch.float32):
        dense = launch.unpack(*weights.arguments, weights.group, shape[0], dtype)
        assert dense.shape == (shape[1], shape[0])


@torch.inference_mode()
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("block", hopper_launch.STAGES)
def test_parts_that_hopper_programs_share(device, block, sym):
    if not hopper_launch.runs_on(device):
        pytest.skip("no Hopper GPU")
    here, there = pair(device, 512, 264, group_size=128, sym=sym)
    kernel, count = there._kernel, multiprocessors(device)
    bias = there.bias.to(torch.bfloat16)
    for rows in (70, 300):
        x = rows_of(rows, 512)
        for plan in hopper_launch.plans(block, rows, 264, 4, count, count):
            weights = kernel._weight
            found = hopper_launch.multiply(
                x.to(device), *weights.arguments, bias, kernel._counters, weights.group, plan
            )
            assert close(found, here(x.float()))


@torch.inference_mode()
def test_fp8_compute(device):
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8")
    here, there = pair(device, 384, 272, compute="fp8")
    for rows in (3, 600):
        x = rows_of(rows, 384)
        assert close(there(x.to(device)), here(x.float()), 0.06)


@torch.inference_mode()
@pytest.mark.parametrize("sym", [True, False])
def test_experts_of_one_token_and_of_many(device, sym):
    scheme, hidden, inner, experts = Scheme(4, 128, sym), 256, 128, 4
    layers = []
    for place in ("cpu", device):
        layer = W4A16Experts(experts, hidden, inner, scheme=scheme, activation=silu, device=place)
        state = {}
        for expert in range(experts):
            for number, (name, shape) in enumerate(
                {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items()
            ):
                tensors = packed(*shape, scheme, 10 * expert + number)
                state |= {f"{expert}.{name}.{key}": tensor for key, tensor in tensors.items()}
        layer.load_state_dict(state)
        layers.append(layer)
    layers[0].prepare(torch.float32, backend="reference")
    layers[1].prepare(torch.bfloat16)
    for tokens in (1, 9, 70, 200):
        x = rows_of(tokens, hidden)
        weights, index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(2)
        index[0, 0] = experts  # nobody's
        expected = layers[0](x.float(), index, weights)
        found = layers[1](x.to(device), index.to(device), weights.to(device, torch.bfloat16))
        assert close(found, expected, 2e-2)
