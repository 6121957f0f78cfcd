"""Which layers are quantized and how; all on the meta device."""

import pytest
import torch

from quantkit.checkpoint import open_model
from quantkit.errors import CheckpointError, RecipeError
from quantkit.families.registry import detect
from quantkit.quantize.metadata import quantization_config
from quantkit.quantize.plan import make_plan
from quantkit.recipe.schema import Recipe

DOUBLE = [
    "norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
    "ff_context.net.2",
]  # fmt: skip
SINGLE = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
BLOCKS = [
    *(f"transformer_blocks.{block}.{name}" for block in range(2) for name in DOUBLE),
    *(f"single_transformer_blocks.{block}.{name}" for block in range(2) for name in SINGLE),
]
OUTSIDE = {
    "x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2", "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2", "norm_out.linear", "proj_out",
}  # fmt: skip


@pytest.fixture
def plan(flux_model):
    def plan_with(group_size=64, layers=None, **scheme):
        recipe = Recipe.model_validate_json(
            Recipe.model_construct(
                version=1,
                model={"id": "tiny"},
                scheme={"iters": 0, "group_size": group_size, **scheme},
                layers=layers or {},
            ).model_dump_json(warnings=False)
        )
        source = open_model(flux_model)
        [part] = make_plan(source, detect(source), recipe).components
        return part

    return plan_with


def test_every_linear_of_the_blocks_is_quantized_and_none_outside(plan):
    part = plan()
    assert sorted(layer.name for layer in part.layers) == sorted(BLOCKS)
    assert dict(part.kept) == dict.fromkeys(OUTSIDE, "outside the blocks")
    assert part.kept_in_blocks == []
    assert {(layer.scheme.bits, layer.scheme.group_size, layer.scheme.sym) for layer in part.layers} == {
        (4, 64, True)
    }


def test_the_quantization_config_is_the_published_one(plan):
    assert quantization_config(plan(128), iters=7, autoround_version="0.16.1") == {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": "transformer_blocks,single_transformer_blocks",
        "iters": 7,
        "autoround_version": "0.16.1",
    }


def test_exclude_keeps_what_it_matches_and_tells_loaders(plan):
    part = plan(layers={"exclude": ["*.to_q", "transformer_blocks.0.ff.net.2"]})
    kept = [name for name in BLOCKS if name.endswith(".to_q")] + ["transformer_blocks.0.ff.net.2"]
    assert sorted(part.kept_in_blocks) == sorted(kept)
    assert {dict(part.kept)[name] for name in kept} == {"excluded by layers.exclude"}
    extra = quantization_config(part, iters=0, autoround_version="")["extra_config"]
    assert extra == {name: {"bits": 16, "data_type": "float"} for name in kept}


def test_include_narrows_the_familys_choice_and_never_widens_it(plan):
    part = plan(layers={"include": ["transformer_blocks.*", "proj_out"]})
    assert [layer.name for layer in part.layers] == [name for name in BLOCKS if not name.startswith("single")]
    assert dict(part.kept)["proj_out"] == "outside the blocks"
    assert dict(part.kept)["single_transformer_blocks.0.proj_out"] == "not in layers.include"
    config = quantization_config(part, iters=0, autoround_version="")
    assert config["block_name_to_quantize"] == "transformer_blocks"


def test_the_last_matching_override_wins_and_inherits_from_the_recipes_scheme(plan):
    part = plan(
        layers={
            "overrides": [
                {"match": "*.to_q", "bits": 8, "group_size": 32},
                {"match": "transformer_blocks.0.attn.to_q", "bits": 2},
                {"match": "transformer_blocks.0.attn.to_k", "sym": False},
                {"match": "*.to_v", "keep": True},
            ]
        }
    )
    schemes = {layer.name: (layer.scheme.bits, layer.scheme.group_size, layer.scheme.sym) for layer in part.layers}
    assert schemes["transformer_blocks.1.attn.to_q"] == (8, 32, True)
    assert schemes["transformer_blocks.0.attn.to_q"] == (2, 64, True)
    assert schemes["transformer_blocks.0.attn.to_k"] == (4, 64, False)
    assert dict(part.kept)["transformer_blocks.0.attn.to_v"] == "kept by layers.overrides"
    extra = quantization_config(part, iters=0, autoround_version="")["extra_config"]
    assert extra["transformer_blocks.0.attn.to_q"] == {"bits": 2, "group_size": 64, "sym": True, "data_type": "int"}
    assert set(extra) == {name for name in BLOCKS if name.endswith((".to_q", ".to_v"))} | {
        "transformer_blocks.0.attn.to_k"
    }


@pytest.mark.parametrize(
    ("layers", "key"),
    [
        ({"include": ["blocks.*"]}, "layers.include: blocks.* matches no Linear"),
        ({"exclude": ["transformer_blocks.0.to_Q"]}, "layers.exclude: transformer_blocks.0.to_Q matches no Linear"),
        ({"overrides": [{"match": "x", "bits": 8}]}, "layers.overrides: x matches no Linear"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_is_a_mistake(plan, layers, key):
    with pytest.raises(RecipeError) as caught:
        plan(layers=layers)
    assert str(caught.value).startswith(key)


def test_a_pattern_close_to_a_layer_is_answered_with_its_name(plan):
    with pytest.raises(RecipeError, match=r"\(did you mean transformer_blocks\.0\.attn\.to_q\?\)"):
        plan(layers={"exclude": ["transformer_blocks.0.attn.to_qq"]})


def test_nothing_left_to_quantize_is_a_mistake(plan):
    with pytest.raises(RecipeError, match="nothing is left to quantize; widen include or shorten exclude"):
        plan(layers={"exclude": ["*"]})


def test_a_group_size_that_divides_no_layer_names_the_key_the_layer_and_what_fits(plan):
    with pytest.raises(RecipeError) as caught:
        plan(48)
    assert str(caught.value) == (
        "scheme.group_size: 48 does not divide in_features 128 of transformer_blocks.0.norm1.linear; "
        "choose 32 or 64 or 128, or exclude it (and 39 more layers)"
    )


def test_one_group_per_output_channel_fits_every_layer(plan):
    assert {layer.tensors[f"{layer.name}.scales"][0][0] for layer in plan(-1).layers} == {1}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_predicted_bytes_follow_from_codes_scales_and_zeros(plan, bits):
    part = plan(bits=bits)
    weights = sum(layer.in_features * layer.out_features for layer in part.layers)
    groups = weights // 64
    packed = weights * bits // 8 + groups * 2 + groups * bits // 8
    assert sum(layer.nbytes for layer in part.layers) == packed
    assert part.nbytes_after == part.nbytes_before - 2 * weights + packed


@pytest.fixture
def damaged(flux_model, tmp_path):
    """A copy of the model whose transformer's configuration or tensors a function changes."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    def damage(config=None, tensors=None):
        folder = tmp_path / "damaged"
        shutil.copytree(flux_model, folder)
        path = folder / "transformer" / "config.json"
        if config:
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if tensors:
            weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
            data = load_file(weights)
            tensors(data)
            save_file(data, weights)
        source = open_model(folder)
        recipe = Recipe.model_validate_json('{"version": 1, "model": {"id": "a"}, "scheme": {"iters": 0}}')
        with pytest.raises(CheckpointError) as caught:
            make_plan(source, detect(source), recipe)
        return str(caught.value).removeprefix(f"{folder}/")

    return damage


def test_weights_that_lack_a_tensor_are_refused(damaged):
    reason = damaged(tensors=lambda data: data.pop("x_embedder.bias"))
    assert reason == "transformer: the weights lack x_embedder.bias; download the model again"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
def test_weights_of_other_dtypes_than_a_model_is_trained_in_are_refused_by_name(damaged, dtype):
    name = "transformer_blocks.0.attn.to_q.weight"
    reason = damaged(tensors=lambda data: data.update({name: data[name].to(dtype)}))
    assert reason.startswith(f"transformer/diffusion_pytorch_model.safetensors: {name} is ")
    assert reason.endswith("weights are quantized from BF16, F16, F32: give the original in one of these")


def test_weights_with_a_tensor_too_many_are_refused(damaged):
    reason = damaged(tensors=lambda data: data.update(extra=data["x_embedder.bias"].clone()))
    assert reason.startswith(
        "transformer/diffusion_pytorch_model.safetensors: extra is no tensor of FluxTransformer2DModel"
    )


def test_weights_of_another_shape_are_refused(damaged):
    reason = damaged(config={"in_channels": 32})
    assert reason.endswith("config.json says [32]")


def test_a_configuration_that_describes_nothing_is_refused(damaged):
    reason = damaged(config={"num_layers": "two"})
    assert reason.startswith("transformer/config.json: does not describe a FluxTransformer2DModel: ")


def test_a_model_that_is_quantized_already_is_refused(damaged):
    reason = damaged(config={"quantization_config": {"bits": 4}})
    assert reason == "transformer/config.json: is quantized already; give the 16-bit original"


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("blocks.0.attn1.to_q", {"transformer": 1, "transformer_2": 1}),
        ("transformer.blocks.0.attn1.to_q", {"transformer": 1, "transformer_2": 0}),
        ("transformer_2.blocks.*", {"transformer": 0, "transformer_2": 20}),
        ("*.ffn.*", {"transformer": 4, "transformer_2": 4}),
    ],
)
def test_a_pattern_means_one_component_if_it_begins_with_its_name(tiny_model, pattern, excluded):
    source = open_model(tiny_model("wan_t2v"))
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"id": "tiny", "task": "t2v"},
            "scheme": {"iters": 0, "group_size": 64},
            "layers": {"exclude": (pattern,)},
        }
    )
    plan = make_plan(source, detect(source), recipe)
    kept = {part.component.name: len(part.kept_in_blocks) for part in plan.components}
    assert kept == excluded


def test_a_pattern_of_a_component_that_the_model_lacks_is_refused(plan):
    with pytest.raises(RecipeError, match=r"transformer_2\.blocks\.\* matches no Linear of the model"):
        plan(layers={"exclude": ["transformer_2.blocks.*"]})
