"""quantization_config: what is read from it and what is refused."""

import pytest

from quantkit_runtime.config import QuantizationConfig, Scheme
from quantkit_runtime.errors import CheckpointFormatError

BASE = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": "transformer_blocks,single_transformer_blocks",
    "autoround_version": "0.16.1",
    "iters": 200,
}


def parse(**changes):
    return QuantizationConfig.from_dict({**BASE, **changes})


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "inc"])
def test_every_name_of_the_method_is_accepted(method):
    assert parse(quant_method=method).scheme == Scheme(4, 128, True)


def test_layers_in_listed_blocks_have_the_default_scheme_and_others_none():
    config = parse()
    assert config.scheme_for("single_transformer_blocks.3.proj_mlp") == Scheme()
    assert config.scheme_for("transformer_blocks.0.attn.to_q") == Scheme()
    assert config.scheme_for("proj_out") is None
    assert config.scheme_for("norm_out.linear") is None


def test_blocks_may_be_a_list_and_may_hold_spaces_around_commas():
    assert parse(block_name_to_quantize=["a", "b"]).blocks == ("a", "b")
    assert parse(block_name_to_quantize="a, b").blocks == ("a", "b")


def test_without_blocks_every_layer_may_be_packed():
    config = QuantizationConfig.from_dict({k: v for k, v in BASE.items() if k != "block_name_to_quantize"})
    assert config.blocks is None
    assert config.scheme_for("anything") == Scheme()


def test_a_block_name_is_a_plain_prefix_as_auto_round_writes_it():
    assert parse(block_name_to_quantize="layers.1").scheme_for("layers.10.q") == Scheme()


def test_an_exact_override_changes_only_its_layer_and_only_the_keys_it_has():
    config = parse(extra_config={"transformer_blocks.0.attn.to_q": {"bits": 8}})
    assert config.scheme_for("transformer_blocks.0.attn.to_q") == Scheme(bits=8)
    # The name is not treated as an expression: it is a substring of this one.
    assert config.scheme_for("single_transformer_blocks.0.attn.to_q") == Scheme()


@pytest.mark.parametrize("override", [{"bits": 16}, {"bits": 16, "data_type": "float", "act_bits": 16}])
def test_16_bits_leave_a_layer_unquantized(override):
    config = parse(extra_config={"transformer_blocks.0.attn.to_q": override})
    assert config.scheme_for("transformer_blocks.0.attn.to_q") is None


def test_patterns_apply_inside_blocks_and_exact_names_win_over_them():
    config = parse(
        extra_config={".*norm.*": {"bits": 16}, "transformer_blocks.1.norm1": {"bits": 2, "group_size": 64}}
    )
    assert config.scheme_for("transformer_blocks.0.norm1") is None
    assert config.scheme_for("transformer_blocks.1.norm1") == Scheme(bits=2, group_size=64)
    assert config.scheme_for("transformer_blocks.1.ff") == Scheme()


def test_the_first_matching_pattern_wins():
    config = parse(extra_config={".*to_q.*": {"bits": 8}, ".*attn.*": {"bits": 2}})
    assert config.scheme_for("transformer_blocks.0.attn.to_q") == Scheme(bits=8)
    assert config.scheme_for("transformer_blocks.0.attn.to_k") == Scheme(bits=2)


def test_an_exact_name_outside_the_blocks_is_packed_but_a_pattern_does_not_reach_there():
    config = parse(extra_config={"lm_head": {"bits": 8}, ".*proj_out.*": {"bits": 8}})
    assert config.scheme_for("lm_head") == Scheme(bits=8)
    assert config.scheme_for("proj_out") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq'"),
        ({"bits": 9}, "quantization_config.bits: 9"),
        ({"bits": "4"}, "quantization_config.bits: '4'"),
        ({"bits": True}, "quantization_config.bits: True"),
        ({"group_size": 0}, "quantization_config.group_size: 0"),
        ({"group_size": [128, 128]}, r"quantization_config.group_size: \[128, 128\]"),
        ({"sym": "yes"}, "quantization_config.sym: 'yes'"),
        ({"data_type": "mx_fp"}, "quantization_config.data_type: 'mx_fp'"),
        (
            {"packing_format": "auto_round:llm_compressor"},
            "quantization_config.packing_format: 'auto_round:llm",
        ),
        (
            {"packing_format": "auto_round:auto_awq", "bits": 8},
            "quantization_config.bits: 8 cannot be stored",
        ),
        ({"act_bits": 8}, "quantization_config.act_bits: 8"),
        ({"rotation_config": {"kind": "hadamard"}}, "quantization_config.rotation_config"),
        ({"block_name_to_quantize": 3}, "quantization_config.block_name_to_quantize: 3"),
        ({"block_name_to_quantize": "a,,b"}, "quantization_config.block_name_to_quantize: 'a,,b'"),
        ({"extra_config": ["a"]}, "quantization_config.extra_config"),
        ({"extra_config": {"a": 8}}, r"extra_config\['a'\]: 8"),
        ({"extra_config": {"a": {"bits": 5}}}, r"extra_config\['a'\].bits: 5"),
        ({"extra_config": {".*(": {"bits": 8}}}, r"extra_config\['.\*\('\]: not a valid regular expression"),
        ({"extra_config": {"a": {"act_bits": 8}}}, r"extra_config\['a'\].act_bits: 8"),
    ],
)
def test_what_cannot_be_read_is_refused_by_key(changes, message):
    with pytest.raises(CheckpointFormatError, match=message):
        parse(**changes)


@pytest.mark.parametrize("key", ["bits", "group_size", "sym"])
def test_a_missing_key_is_named(key):
    with pytest.raises(CheckpointFormatError, match=f"quantization_config.{key}: missing"):
        QuantizationConfig.from_dict({name: value for name, value in BASE.items() if name != key})
