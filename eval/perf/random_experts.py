"""Layers of experts with random weights, inputs for them and their error against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import measuring
import random_weights
from quantkit_runtime import W4A16Experts
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize

DTYPE = torch.bfloat16
_COMPARED_TOKENS = 8


def random_experts(
    config: Any, compute: str | None, device: torch.device, generator: torch.Generator, backend: str
) -> nn.Module:
    """Make the experts of a layer, transformers' own or packed ones in their place."""
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextExperts

    with torch.device("meta"):
        experts: nn.Module = Qwen3OmniMoeThinkerTextExperts(config)
    if compute is not None:
        return packed_experts(experts, config, compute, device, generator, backend)
    random_weights.fill(experts, device=device, dtype=DTYPE, generator=generator)
    return experts


def packed_experts(
    experts: Any, config: Any, compute: str, device: torch.device, generator: torch.Generator, backend: str
) -> W4A16Experts:
    """Make packed experts of the shape of transformers' own, random and prepared."""
    packed = W4A16Experts(
        config.num_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        scheme=Scheme(),
        activation=experts.act_fn,
        device=device,
    )
    random_weights.fill_packed(packed, generator)
    packed.prepare(DTYPE, compute=compute, backend=backend)
    return packed


def routed(
    config: Any, tokens: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the experts of each token and their weights, as a random router gives them."""
    hidden = torch.randn(tokens, config.hidden_size, dtype=DTYPE, device=device, generator=generator)
    logits = torch.randn(tokens, config.num_experts, device=device, generator=generator)
    weights, index = logits.softmax(-1).topk(config.num_experts_per_tok)
    return hidden, index, (weights / weights.sum(-1, keepdim=True)).to(DTYPE)


def error_of(layer: Any, inputs: tuple[Tensor, Tensor, Tensor], out: Any) -> float:
    """Return the error of the first tokens against float64 with the very weights of the layer."""
    hidden, index, weights = (tensor[:_COMPARED_TOKENS] for tensor in inputs)
    exact = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for token in range(len(hidden)):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            gate_up, down = float64_weights(layer, expert)
            gate, up = (gate_up @ hidden[token].double()).chunk(2)
            exact[token] += weight * (down @ (nn.functional.silu(gate) * up))
    return measuring.relative_error(out[:_COMPARED_TOKENS], exact)


def float64_weights(layer: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Return gate and up, and down, of an expert."""
    if not isinstance(layer, W4A16Experts):
        return layer.gate_up_proj[expert].double(), layer.down_proj[expert].double()
    both = []
    for name in ("gate_up", "down"):
        tensors = {suffix: stack[expert] for suffix, stack in layer.packed(name).items()}
        both.append(dequantize(tensors, layer.scheme, torch.float64))
    return both[0], both[1]
