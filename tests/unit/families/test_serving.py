"""The names that vLLM-Omni gives to a family's Linears, and which of them it splits under tensor parallelism."""

import pytest

from quantkit.families.registry import family_names, get_family

OMNI = get_family("qwen3-omni").vllm_omni


@pytest.mark.parametrize("name", family_names())
def test_every_family_says_how_it_is_served(name):
    assert get_family(name).vllm_omni is not None


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        ("flux", "transformer_blocks.3.attn.to_k", "transformer_blocks.3.attn.to_qkv"),
        ("flux", "transformer_blocks.3.attn.add_v_proj", "transformer_blocks.3.attn.add_kv_proj"),
        ("flux", "transformer_blocks.3.attn.to_out.0", "transformer_blocks.3.attn.to_out.0"),
        ("wan2.2-t2v", "blocks.0.attn1.to_q", "blocks.0.attn1.to_qkv"),
        ("wan2.2-t2v", "blocks.0.attn2.to_q", "blocks.0.attn2.to_q"),
        ("wan2.2-i2v", "blocks.0.attn2.to_out.0", "blocks.0.attn2.to_out"),
        ("wan2.2-ti2v", "blocks.0.ffn.net.0.proj", "blocks.0.ffn.net_0.proj"),
        ("wan2.2-ti2v", "blocks.0.ffn.net.2", "blocks.0.ffn.net_2"),
        ("glm-image", "transformer_blocks.1.attn1.to_v", "transformer_blocks.1.attn1.to_qkv"),
    ],
)
def test_linears_are_called_as_the_engine_calls_them(family, layer, name):
    assert get_family(family).vllm_omni.name_of(layer) == name


def test_language_models_fuse_attention_feed_forward_and_experts():
    prefix = "thinker.model.layers.0"
    assert OMNI.name_of(f"{prefix}.self_attn.k_proj") == f"{prefix}.self_attn.qkv_proj"
    assert OMNI.name_of(f"{prefix}.mlp.up_proj") == f"{prefix}.mlp.gate_up_proj"
    assert {
        OMNI.name_of(f"{prefix}.mlp.experts.{expert}.{name}_proj") for expert in (0, 11) for name in ("up", "down")
    } == {f"{prefix}.mlp.experts"}


@pytest.mark.parametrize(
    ("layer", "split"),
    [("attn.to_out.0", True), ("ff.net.2", True), ("attn.to_q", False), ("ff.net.0.proj", False)],
)
def test_row_parallel_layers_are_those_that_end_a_split(layer, split):
    assert get_family("flux").vllm_omni.splits_input(f"transformer_blocks.0.{layer}") == split


def test_the_single_blocks_of_flux_end_in_a_layer_that_is_not_split():
    assert not get_family("flux").vllm_omni.splits_input("single_transformer_blocks.0.proj_out")
