"""Every rule of the servability check has checkpoints that break just that rule, for every engine that has it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from breakable import packed_layer

from quantkit.errors import CheckpointError
from quantkit.families.registry import get_family
from quantkit.inspect.rule import TARGETS
from quantkit.inspect.servability import RULES, check_natural_targets, check_servability

SOUND = {"vllm-omni": "flux", "diffusers": "flux-g128", "transformers": "llama"}
MATRIX = torch.zeros(8, 8, dtype=torch.bfloat16)
CASES = []


@dataclass(frozen=True)
class Case:
    """One way to break one rule."""

    rule: str
    target: str
    base: str
    change: object

    def __str__(self):
        return f"{self.target}-{self.rule}-{self.change.__name__}"


def breaks(rule, **bases):
    """Register a function that breaks a rule: for every engine that has it, or for those given with a base."""
    targets = {target for one in RULES if one.id == rule for target in one.targets}
    chosen = {name.replace("_", "-"): base for name, base in bases.items()} or {
        target: SOUND[target] for target in targets
    }

    def register(change):
        CASES.extend(Case(rule, target, base, change) for target, base in sorted(chosen.items()))
        return change

    return register


@breaks("layout", diffusers="llama", transformers="flux-g128")
def of_another_library(_model, _monkeypatch):
    pass


@breaks("files", vllm_omni="flux", diffusers="flux-g128")
def a_component_without_its_config(model, _monkeypatch):
    (model.folder / "vae" / "config.json").unlink()


@breaks("files")
def truncated_weights(model, _monkeypatch):
    content = model.weights.read_bytes()
    model.weights.unlink()
    model.weights.write_bytes(content[:-1])


@breaks("files")
def no_weights(model, _monkeypatch):
    model.weights.unlink()


@breaks("files", vllm_omni="flux", diffusers="flux-g128")
def another_component_without_weights(model, _monkeypatch):
    (model.folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


@breaks("files", vllm_omni="flux", diffusers="flux-g128")
def another_component_missing(model, _monkeypatch):
    shutil.rmtree(model.folder / "vae")


def set_engine(monkeypatch, **values):
    flux = get_family("flux")
    changed = replace(flux, vllm_omni=replace(flux.vllm_omni, **values))
    monkeypatch.setattr("quantkit.inspect.quantized.detect", lambda _pipeline: changed)


@breaks("architecture-unsupported")
def unsupported_family(_model, monkeypatch):
    set_engine(monkeypatch, unsupported="cannot build it")


@breaks("architecture-unvalidated")
def unvalidated_family(_model, monkeypatch):
    set_engine(monkeypatch, unvalidated="has never been tried")


@breaks("architecture-unvalidated", vllm_omni="omni")
def bagel(model, _monkeypatch):
    model.edit_json(model.config_path, lambda config: config.update(architectures=["bagel"]))


@breaks("architecture-unknown", vllm_omni="omni")
def unknown_model_type(model, _monkeypatch):
    model.edit_json(model.config_path, lambda config: config.update(architectures=["UnheardOf"]))


@breaks("config-place", vllm_omni="omni", transformers="llama")
def metadata_in_a_place_of_its_own(model, _monkeypatch):
    metadata = model.metadata()
    model.edit_json(model.config_path, lambda config: config.update(a_config={"quantization_config": metadata}))


@breaks("component")
def a_quantized_component_that_is_no_transformer(model, _monkeypatch):
    shutil.copytree(model.model, model.folder / "controlnet")
    entry = {"controlnet": ["diffusers", "FluxTransformer2DModel"]}
    model.edit_json(model.folder / "model_index.json", lambda index: index.update(entry))


@breaks("transformers-differ")
def a_second_transformer_in_16_bit(model, _monkeypatch):
    shutil.copytree(model.model, model.folder / "transformer_2")
    config = model.folder / "transformer_2" / "config.json"
    model.edit_json(config, lambda content: content.pop("quantization_config"))
    entry = {"transformer_2": ["diffusers", "FluxTransformer2DModel"]}
    model.edit_json(model.folder / "model_index.json", lambda index: index.update(entry))


@breaks("quant-method")
def another_method(model, _monkeypatch):
    model.set(quant_method="gptq")


@breaks("quant-method", diffusers="flux-g128", transformers="llama")
def a_spelling_that_only_vllm_knows(model, _monkeypatch):
    model.set(quant_method="inc")


@breaks("scheme-types")
def bits_as_text(model, _monkeypatch):
    model.set(bits="4")


@breaks("scheme-types")
def a_group_size_of_two_dimensions(model, _monkeypatch):
    model.set(group_size=[128, 128])


@breaks("scheme-types")
def no_sym(model, _monkeypatch):
    model.set(sym=None)


@breaks("data-type")
def a_float_type(model, _monkeypatch):
    model.set(data_type="mx_fp")


@breaks("data-type")
def a_float_type_of_one_layer(model, _monkeypatch):
    model.override(**{model.layer: {"data_type": "mx_fp"}})


@breaks("packing-format")
def an_unknown_packing(model, _monkeypatch):
    model.set(packing_format="auto_round:llm_compressor")


@breaks("packing-format", vllm_omni="flux")
def the_plain_packing(model, _monkeypatch):
    model.set(packing_format="auto_round")


@breaks("backend", vllm_omni="flux")
def a_backend_without_marlin(model, _monkeypatch):
    model.set(backend="gptq")


@breaks("backend", diffusers="flux-g128")
def a_backend_of_vllm(model, _monkeypatch):
    model.set(backend="gptq:marlin")


@breaks("backend-override")
def a_scheme_that_is_not_the_loaders_default(model, _monkeypatch):
    names = {name.rpartition(".")[0] for name in model.tensors() if name.endswith(".qweight")}
    model.override(**{name: {"group_size": 128} for name in names})
    model.set(group_size=64)


@breaks("dropped-features")
def quantized_activations(model, _monkeypatch):
    model.set(act_bits=8)


@breaks("dropped-features")
def a_rotation_of_one_layer(model, _monkeypatch):
    model.override(**{model.layer: {"rotation_config": {"kind": "hadamard"}}})


@breaks("extra-config")
def an_override_that_is_no_mapping(model, _monkeypatch):
    model.override(**{model.layer: 16})


@breaks("extra-config")
def a_broken_regular_expression(model, _monkeypatch):
    model.override(**{"[": {"bits": 16}})


@breaks("block-names")
def no_block_names(model, _monkeypatch):
    model.set(block_name_to_quantize=None)


@breaks("block-format")
def a_space_in_the_block_names(model, _monkeypatch):
    names = model.metadata()["block_name_to_quantize"].split(",")
    model.set(block_name_to_quantize=" " + ", ".join(names))


@breaks("block-format")
def an_empty_block_name(model, _monkeypatch):
    model.set(block_name_to_quantize=model.metadata()["block_name_to_quantize"] + ",")


@breaks("block-format")
def a_number_as_block_names(model, _monkeypatch):
    model.set(block_name_to_quantize=3)


@breaks("block-moved", transformers="omni")
def only_the_older_name_of_a_moved_block(model, _monkeypatch):
    model.set(block_name_to_quantize="thinker.model.layers")


@breaks("nothing-packed")
def metadata_without_packed_layers(model, _monkeypatch):
    model.put({}, remove=(".qweight", ".qzeros", ".scales"))


@breaks("block-unmatched")
def a_block_name_of_nothing(model, _monkeypatch):
    model.set(block_name_to_quantize=model.metadata()["block_name_to_quantize"] + ",nowhere.blocks")


@breaks("block-prefix-collision")
def a_module_that_begins_like_a_block(model, _monkeypatch):
    model.put({f"{model.block}_norm.linear.weight": MATRIX})


@breaks("packed-unlisted")
def a_packed_layer_outside_the_blocks(model, _monkeypatch):
    model.put(packed_layer("embedder.linear", 128, 64))


@breaks("packed-unlisted")
def a_packed_layer_that_is_excluded(model, _monkeypatch):
    model.override(**{model.layer: {"bits": 16}})


@breaks("listed-unpacked")
def a_16_bit_linear_in_a_block(model, _monkeypatch):
    model.put({f"{model.block}.0.adapter.weight": MATRIX})


@breaks("listed-unpacked")
def a_16_bit_linear_that_a_key_calls_packed(model, _monkeypatch):
    model.put({"head.weight": MATRIX})
    model.override(head={"bits": 4})


@breaks("runtime-key")
def a_fused_layer_excluded_by_its_members_names(model, _monkeypatch):
    names = [f"{model.block}.0.attn.to_{letter}" for letter in "qkv"]
    weights = {f"{name}.weight": MATRIX for name in names}
    model.put(weights, remove=[f"{name}.{part}" for name in names for part in ("qw", "qz", "s")])
    model.override(**{name: {"bits": 16} for name in names})


@breaks("fused-scheme", vllm_omni="flux")
def one_of_fused_layers_excluded(model, _monkeypatch):
    name = f"{model.block}.0.attn.to_q"
    model.put({f"{name}.weight": MATRIX}, remove=[f"{name}.{part}" for part in ("qw", "qz", "s")])
    model.override(**{name: {"bits": 16}})


@breaks("fused-scheme", vllm_omni="omni")
def an_expert_of_another_scheme(model, _monkeypatch):
    name = f"{model.block}.0.mlp.experts.1.gate_proj"
    model.put(packed_layer(name, 1024, 64, group_size=64))
    model.override(**{name: {"group_size": 64}})


@breaks("layer-incomplete")
def a_layer_without_zero_points(model, _monkeypatch):
    model.put({}, remove=[f"{model.layer}.qzeros"])


@breaks("alignment")
def groups_that_do_not_divide_k(model, _monkeypatch):
    size = model.metadata()["group_size"]
    model.put(packed_layer(model.layer, size + 8, 64, group_size=size))


@breaks("alignment")
def words_that_do_not_divide_n(model, _monkeypatch):
    size = model.metadata()["group_size"]
    model.put(packed_layer(model.layer, 8 * size, 20, group_size=size))


@breaks("tensor-layout")
def scales_of_another_dtype(model, _monkeypatch):
    name = f"{model.layer}.scales"
    model.put({name: model.tensors()[name].to(torch.bfloat16)})


@breaks("tensor-layout")
def too_few_groups(model, _monkeypatch):
    name = f"{model.layer}.scales"
    model.put({name: model.tensors()[name][:-1] if model.pipeline else model.tensors()[name][:4].clone()})


@breaks("tensor-layout")
def scales_that_are_no_matrix(model, _monkeypatch):
    name = f"{model.layer}.scales"
    model.put({name: model.tensors()[name].flatten()})


@breaks("g-idx")
def groups_in_activation_order(model, _monkeypatch):
    size = model.metadata()["group_size"]
    features = 8 * model.tensors()[f"{model.layer}.qweight"].shape[0]
    order = (torch.arange(features) + size // 2) // size
    model.put({f"{model.layer}.g_idx": order.to(torch.int32)})


@breaks("stale-weight")
def a_16_bit_twin(model, _monkeypatch):
    model.put({f"{model.layer}.weight": MATRIX})


@breaks("cuda-scheme")
def two_bits(model, _monkeypatch):
    model.put(packed_layer(model.layer, 256, 1536, bits=2, group_size=32))
    model.override(**{model.layer: {"bits": 2}})


@breaks("group-size")
def groups_of_256(model, _monkeypatch):
    model.put(packed_layer(model.layer, 256, 1536, group_size=256))
    model.override(**{model.layer: {"group_size": 256}})


@breaks("xpu")
def eight_bits(model, _monkeypatch):
    model.put(packed_layer(model.layer, 256, 1536, bits=8, group_size=32))
    model.override(**{model.layer: {"bits": 8}})


@breaks("xpu")
def whole_rows_of_40(model, _monkeypatch):
    model.put(packed_layer(model.layer, 40, 1536, group_size=-1))
    model.override(**{model.layer: {"group_size": -1}})


@breaks("tensor-parallel", vllm_omni="flux")
def few_groups_in_a_row_parallel_layer(model, _monkeypatch):
    name = f"{model.block}.0.attn.to_out.0"
    model.put(packed_layer(name, 256, 256, group_size=128))
    model.override(**{name: {"group_size": 128}})


@breaks("tensor-parallel", vllm_omni="omni")
def few_groups_in_a_down_projection(model, _monkeypatch):
    model.put(
        {
            name: tensor
            for expert in range(2)
            for name, tensor in packed_layer(f"{model.block}.0.mlp.experts.{expert}.down_proj", 768, 64).items()
        }
    )


@breaks("weight-names")
def file_names_of_the_other_library(model, _monkeypatch):
    stem = "model" if model.pipeline else "diffusion_pytorch_model"
    model.weights.rename(model.model / f"{stem}.safetensors")


@breaks("float32-modules")
def a_module_in_float32(model, _monkeypatch):
    model.put({"proj_out.bias": model.tensors()["proj_out.bias"].float()})


@breaks("experts-lost")
def experts_of_another_stage_in_16_bit(model, _monkeypatch):
    model.put({f"talker.model.layers.0.mlp.experts.{expert}.up_proj.weight": MATRIX for expert in range(2)})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_that_breaks_a_rule_has_just_that_finding(case, breakable, monkeypatch):
    model = breakable(case.base)
    case.change(model, monkeypatch)
    findings = check_servability(model.folder, case.target)
    assert [finding.rule for finding in findings] == [case.rule], findings
    [finding] = findings
    assert finding.where
    assert finding.what
    assert finding.mend
    assert str(model.folder) not in finding.where
    [severity] = {rule.severity for rule in RULES if rule.id == case.rule and case.target in rule.targets}
    assert finding.severity == severity


def test_every_rule_of_every_engine_has_a_case():
    ruled = {(rule.id, target) for rule in RULES for target in rule.targets}
    assert {(case.rule, case.target) for case in CASES} == ruled
    assert len(ruled) == sum(len(rule.targets) for rule in RULES)  # no engine has a rule twice


def test_every_check_says_what_it_asks_for():
    for rule in RULES:
        assert rule.check.__doc__, rule.id


@pytest.mark.parametrize(
    ("target", "name"), [*SOUND.items(), ("vllm-omni", "omni"), ("transformers", "omni")], ids=str
)
def test_a_sound_checkpoint_has_no_finding(sound, target, name):
    assert check_servability(sound[name], target) == []


def test_a_trivial_g_idx_is_no_finding(breakable):
    model = breakable("flux")
    features = 8 * model.tensors()[f"{model.layer}.qweight"].shape[0]
    model.put({f"{model.layer}.g_idx": torch.arange(features, dtype=torch.int32) // 32})
    assert check_servability(model.folder, "vllm-omni") == []


def test_a_common_prefix_of_blocks_that_are_all_packed_is_no_finding(breakable):
    """auto-round writes ``layers.1`` for blocks 10 to 19."""
    model = breakable("flux")
    model.set(block_name_to_quantize="trans,single_transformer_blocks")
    assert [finding.rule for finding in check_servability(model.folder, "vllm-omni")] == []


@pytest.mark.parametrize("key", [".to_qkv", r".*attn\.to_(q|k|v|qkv)$"])
def test_a_runtime_name_or_a_matching_expression_excludes_a_fused_layer(breakable, key):
    model = breakable("flux")
    a_fused_layer_excluded_by_its_members_names(model, None)
    name = f"{model.block}.0.attn{key}" if key.startswith(".to") else f"^{model.block}.0{key}"
    model.override(**{name: {"bits": 16}})
    assert check_servability(model.folder, "vllm-omni") == []


def test_equal_trouble_in_several_blocks_is_one_finding(breakable):
    model = breakable("flux")
    model.put({f"{model.block}.{index}.adapter.weight": MATRIX for index in range(2)})
    [finding] = check_servability(model.folder, "vllm-omni")
    assert finding.count == 2
    assert finding.place == f"{model.block}.0.adapter and 1 more"


def test_other_trouble_of_the_same_rule_is_another_finding(breakable):
    model = breakable("flux")
    model.put({f"{model.block}.0.{name}.weight": MATRIX for name in ("one", "other")})
    assert [finding.rule for finding in check_servability(model.folder, "vllm-omni")] == ["listed-unpacked"] * 2


def test_sizes_of_tensor_parallelism_that_fail_are_named(breakable):
    model = breakable("omni")
    few_groups_in_a_down_projection(model, None)
    [finding] = check_servability(model.folder, "vllm-omni")
    assert (finding.what, finding.count) == ("K / TP is no multiple of 128 at TP = 4, 8 (K = 768)", 2)


def test_a_checkpoint_is_checked_for_the_engines_of_its_layout(sound):
    assert check_natural_targets(sound["flux-g128"]).keys() == {"vllm-omni", "diffusers"}
    assert check_natural_targets(sound["llama"]).keys() == {"vllm-omni", "transformers"}


@pytest.mark.parametrize("value", [None, [], {}, [[1]], {"a": {"b": 1}}, "", ",", "x", -1, 1e9, True], ids=repr)
@pytest.mark.parametrize("name", ["flux", "llama"])
def test_no_metadata_breaks_the_check_itself(breakable, name, value):
    model = breakable(name)
    sound = model.metadata()
    for key in (*sound, "extra_config", "backend", "act_bits"):
        model.set(**{**sound, "extra_config": None, "backend": None, "act_bits": None, key: value})
        for target in TARGETS:
            check_servability(model.folder, target)
    model.set(**{**sound, "backend": None, "act_bits": None})
    model.set(extra_config={model.layer: value, "^.*to_k$": {"bits": value, "group_size": value}})
    for target in TARGETS:
        check_servability(model.folder, target)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (4, 0), (1, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_no_shape_breaks_the_check_itself(breakable, suffix, shape):
    model = breakable("flux")
    model.put({f"{model.layer}.{suffix}": torch.zeros(shape, dtype=torch.int32)})
    for target in TARGETS:
        assert check_servability(model.folder, target)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_quantized_or_no_model_is_refused(flux_model, tmp_path, target):
    with pytest.raises(CheckpointError, match="nothing in it has a quantization_config; it is not quantized"):
        check_servability(flux_model, target)
    with pytest.raises(CheckpointError, match=r"has neither model_index\.json nor config\.json"):
        check_servability(tmp_path, target)
    with pytest.raises(CheckpointError, match="no such folder"):
        check_servability(tmp_path / "none", target)


def test_the_documentation_names_every_rule():
    text = (Path(__file__).parents[3] / "docs" / "servability.md").read_text(encoding="utf-8")
    assert {rule.id for rule in RULES} <= set(text.split("`")[1::2])
