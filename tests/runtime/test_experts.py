"""Packed experts: what they compute, what they store, what they refuse."""

import pytest
import torch
from torch.nn import functional

from quantkit_runtime import W4A16Experts
from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError, QuantkitRuntimeError
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.kernels import register
from quantkit_runtime.kernels.cpu_experts import MAX_INT4_ROWS
from quantkit_runtime.kernels.dispatch import _REGISTRY
from quantkit_runtime.rounding import quantize_rtn

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 128, 64, 9, 2


def packed_state(scheme, seed=0):
    """The checkpoint's tensors of random experts, and their dequantized weights by ``<expert>.<projection>``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    state, weights = {}, {}
    for expert in range(EXPERTS):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
            tensors = pack(*quantize_rtn(weight, scheme), scheme)
            state |= {f"{expert}.{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
            weights[f"{expert}.{name}"] = dequantize(tensors, scheme, torch.float64)
    return state, weights


def make(scheme, device=None):
    return W4A16Experts(EXPERTS, HIDDEN, INNER, scheme=scheme, activation=functional.silu, device=device)


def route(seed=1, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, index = scores.topk(TOP_K)
    return x, index, weights.to(torch.bfloat16)


def exact(x, index, weights, dense):
    """Every token and expert on its own, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if expert < EXPERTS:
                value = x[token].double()
                inner = functional.silu(dense[f"{expert}.gate_proj"] @ value) * (dense[f"{expert}.up_proj"] @ value)
                out[token] += weights[token, slot].double() * (dense[f"{expert}.down_proj"] @ inner)
    return out


SCHEMES = [
    Scheme(4, 64, True),
    Scheme(4, -1, True),
    Scheme(8, 32, False),
    Scheme(4, 64, False, packing_format="auto_round:auto_awq"),
    Scheme(3, 64, True),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"W{s.bits}-g{s.group_size}-{s.packing_format}")
@torch.inference_mode()
def test_the_output_is_that_of_the_dequantized_weights(scheme):
    state, dense = packed_state(scheme)
    layer = make(scheme)
    layer.load_state_dict(state)
    x, index, weights = route()
    out = layer(x, index, weights)
    wanted = exact(x, index, weights, dense)
    assert out.dtype == torch.bfloat16
    error = torch.linalg.vector_norm(out.double() - wanted) / torch.linalg.vector_norm(wanted)
    assert error < 0.01  # three roundings to bf16, 2 ** -9 each, and the sum over experts


@torch.inference_mode()
def test_in_float64_nothing_is_lost():
    state, dense = packed_state(SCHEMES[0])
    layer = make(SCHEMES[0])
    layer.load_state_dict(state)
    x, index, weights = route()
    out = layer(x.double(), index, weights.double())
    torch.testing.assert_close(out, exact(x, index, weights, dense), rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_a_slot_that_is_sent_nowhere_adds_nothing():
    state, dense = packed_state(SCHEMES[0])
    layer = make(SCHEMES[0])
    layer.load_state_dict(state)
    x, index, weights = route()
    index[0] = EXPERTS
    index[1, 0] = EXPERTS
    out = layer(x.double(), index, weights.double())
    assert not out[0].any()
    torch.testing.assert_close(out, exact(x, index, weights, dense), rtol=1e-12, atol=1e-12)


def test_the_state_is_the_checkpoints_own_tensors_bit_for_bit():
    state, _ = packed_state(SCHEMES[0])
    layer = make(SCHEMES[0])
    layer.load_state_dict(state)
    given_back = layer.state_dict()
    assert given_back.keys() == state.keys()
    assert all(torch.equal(given_back[name], state[name]) for name in state)
    assert all(given_back[name].dtype == state[name].dtype for name in state)


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named():
    state, _ = packed_state(SCHEMES[0])
    layer = make(SCHEMES[0])
    state["9.gate_proj.qweight"] = state.pop("0.gate_proj.qweight")
    state["1.up_proj.scales"] = state["1.up_proj.scales"][:, :8]
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    for part in (
        'Missing key(s) in state_dict: "0.gate_proj.qweight"',
        "9.gate_proj.qweight",
        "1.up_proj.scales: (",
    ):
        assert part in str(caught.value)


def test_a_change_of_dtype_leaves_the_buffers_alone():
    layer = make(SCHEMES[0]).to(torch.bfloat16).half()
    assert layer.gate_up_scales.dtype == torch.float16
    assert layer.gate_up_qweight.dtype == torch.int32


@torch.inference_mode()
def test_new_weights_are_used_at_once():
    layer = make(SCHEMES[0])
    x, index, weights = route()
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    before = layer(x, index, weights)
    layer.load_state_dict(packed_state(SCHEMES[0], seed=5)[0])
    assert not torch.equal(layer(x, index, weights), before)


def test_a_gradient_is_refused_in_one_line():
    layer = make(SCHEMES[0])
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    x, index, weights = route()
    with pytest.raises(QuantkitRuntimeError, match="W4A16Experts: packed layers have no backward pass"):
        layer(x.requires_grad_(), index, weights)


def test_weights_that_were_never_loaded_are_refused():
    with pytest.raises(CheckpointFormatError, match="W4A16Experts: its weights were never loaded"):
        make(SCHEMES[0], device="meta").prepare()


def test_sizes_that_do_not_fit_the_scheme_are_refused():
    with pytest.raises(CheckpointFormatError, match="in_features 128 is not divisible by group_size 48"):
        make(Scheme(4, 48, True))


def test_a_backend_for_linear_layers_only_leaves_experts_to_the_best_there_is():
    @register("linear", "linear-only", priority=-1, requirement=lambda _: None)
    def prepare(*_):
        raise AssertionError

    layer = make(SCHEMES[0])
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    layer.prepare(backend="linear-only")
    assert layer.backend == "cpu"
    del _REGISTRY["linear", "linear-only"]


@pytest.mark.parametrize("tokens", [1, TOKENS, MAX_INT4_ROWS * EXPERTS])
@pytest.mark.parametrize("scheme", [Scheme(4, 64, True), Scheme(4, 32, False)], ids=["sym", "asym"])
@torch.inference_mode()
def test_the_cpu_backend_is_as_exact_as_the_reference(scheme, tokens):
    state, dense = packed_state(scheme)
    layer = make(scheme)
    layer.load_state_dict(state)
    x, index, weights = route(tokens=tokens)
    wanted = exact(x, index, weights, dense)
    errors = {}
    for backend in ("cpu", "reference"):
        layer.prepare(backend=backend)
        out = layer(x, index, weights)
        errors[backend] = float((out.double() - wanted).norm() / wanted.norm())
    assert errors["cpu"] < 1.2 * errors["reference"]
    layer.prepare(backend="cpu")
    assert layer.extra_bytes > 0


def test_the_cpu_backend_refuses_what_the_operator_cannot_read():
    layer = make(SCHEMES[2])
    layer.load_state_dict(packed_state(SCHEMES[2])[0])
    with pytest.raises(BackendUnavailableError, match="int4 operator reads 4-bit weights, not 8-bit ones"):
        layer.prepare(backend="cpu")
    layer.prepare()
    assert layer.backend == "reference"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.inference_mode()
def test_no_tokens_give_no_rows(backend):
    layer = make(SCHEMES[0])
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    layer.prepare(backend=backend)
    x, index, weights = route()
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.inference_mode()
def test_the_forward_is_captured_without_a_graph_break(backend):
    layer = make(SCHEMES[0])
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    layer.prepare(backend=backend)
    arguments = route()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), layer(*arguments))


@torch.inference_mode()
def test_on_dense_weights_the_reference_gives_the_bits_of_a_loop_over_experts():
    state, _ = packed_state(SCHEMES[0])
    layer = make(SCHEMES[0])
    layer.load_state_dict(state)
    layer.prepare(backend="reference")
    x, index, weights = route(tokens=50)
    wanted = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, slot = torch.where(index == expert)
        gate_up, down = (
            dequantize({key: stack[expert] for key, stack in layer.packed(name).items()}, SCHEMES[0], x.dtype)
            for name in ("gate_up", "down")
        )
        gate, up = functional.linear(x[token], gate_up).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, down) * weights[token, slot, None]
        wanted.index_add_(0, token, y)
    assert torch.equal(layer(x, index, weights), wanted)


def test_a_compute_mode_that_no_backend_has_is_refused_with_the_reason():
    layer = make(SCHEMES[0])
    layer.load_state_dict(packed_state(SCHEMES[0])[0])
    with pytest.raises(BackendUnavailableError, match="no backend serves experts with compute 'fp8'"):
        layer.prepare(compute="fp8")
