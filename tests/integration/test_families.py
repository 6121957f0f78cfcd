"""Every diffusion family on tiny random models of its own classes: quantize, verify, load, generate."""

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from interrupted import interrupted_and_resumed

from quantkit.checkpoint import open_model
from quantkit.errors import QuantizationError, RecipeError
from quantkit.quantize.run import prepare, quantize
from quantkit.quantize.tensors import read_tensor
from quantkit.quantize.verify import verify
from quantkit.recipe import load_recipe
from quantkit_runtime import W4A16Linear, load_pipeline
from quantkit_runtime.format import dequantize

TUNED = ("scheme.iters=2", "scheme.lr=0.005")  # larger steps leave rounding to nearest the best of two
NEVER_PACKED = ("proj_out", "norm_out", "time_embedder", "glyph_projector", "lm_head", "visual")


def in_blocks(blocks, *names):
    return {f"{blocks}.{index}.{name}" for index in range(2) for name in names}


WAN = in_blocks(
    "blocks",
    *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)
GLM = in_blocks(
    "transformer_blocks",
    *("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"),
)
OVIS = in_blocks(
    "transformer_blocks",
    *("norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
) | in_blocks(
    "single_transformer_blocks",
    *("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
)


@dataclass(frozen=True)
class Case:
    """A family and what is to come of its tiny model."""

    family: str
    task: str
    layers: dict[str, set[str]]
    sampling: dict[str, int] = field(default_factory=dict)


CASES = {
    "wan_t2v": Case("wan2.2-t2v", "t2v", {"transformer": WAN, "transformer_2": WAN}, {"num_frames": 5}),
    "wan_i2v": Case("wan2.2-i2v", "i2v", {"transformer": WAN, "transformer_2": WAN}, {"num_frames": 5}),
    "wan_ti2v": Case("wan2.2-ti2v", "t2v", {"transformer": WAN}, {"num_frames": 5}),
    "glm_image": Case("glm-image", "t2i", {"transformer": GLM}, {"height": 128, "width": 128}),
    "ovis_image": Case("ovis-image", "t2i", {"transformer": OVIS}),
}
every_family = pytest.mark.parametrize("model", CASES)


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """A recipe for each tiny model, by name, with captioned pictures beside it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("recipes")
    for colour in ("red", "blue"):
        Image.new("RGB", (48, 40), colour).save(folder / f"{colour}.png")
    captions = "id\tcaption\timage\n1\ta red circle\tred.png\n2\ta blue square\tblue.png\n"
    (folder / "captions.tsv").write_text(captions, encoding="utf-8")
    paths = {}
    for model, case in CASES.items():
        sampling = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, **case.sampling}
        recipe = {
            "version": 1,
            "model": {"id": "tiny", "task": case.task},
            "scheme": {"group_size": 64, "iters": 0, "nsamples": 2, "batch_size": 1},
            "sampling": sampling,
            "calibration": {"prompts": "captions.tsv"},
        }
        paths[model] = folder / f"{model}.yaml"
        paths[model].write_text(json.dumps(recipe), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def prepared(recipes, tiny_model):
    return lambda model, *overrides: prepare(load_recipe(recipes[model], overrides), tiny_model(model))


@pytest.fixture(scope="session")
def quantized(prepared, tmp_path_factory):
    """Quantize a tiny model once per set of overrides: ``quantized("wan_t2v", *TUNED)``."""
    folder = tmp_path_factory.mktemp("families")
    made = {}

    def get(model, *overrides):
        key = (model, overrides)
        if key not in made:
            made[key] = quantize(prepared(model, *overrides), folder / f"{model}-{len(made)}")
        return made[key]

    return get


def load(folder, **options):
    pipeline = load_pipeline(folder, dtype=torch.bfloat16, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, prepared_run, *, prompt="a red circle", seed=3):
    """Return pictures or frames, and the latents they are made of."""
    from quantkit.recipe import Prompt

    family, recipe = prepared_run.family, prepared_run.loaded.recipe
    kwargs = family.call_kwargs(family.sampling_for(recipe.sampling))
    latents = []

    def keep(_pipeline, _step, _timestep, given):
        latents.append(given["latents"].clone())
        return given

    output = pipeline(
        **family.prompt_kwargs(Prompt(prompt, str(prepared_run.loaded.path.parent / "red.png"))),
        **kwargs,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback_on_step_end=keep,
    )
    [pictures] = output.values()
    return torch.as_tensor(pictures), latents[-1]


def manifest(checkpoint):
    return json.loads((checkpoint / "quantkit.json").read_text(encoding="utf-8"))


def dequantized(source, checkpoint):
    """Load a source with the packed layers' weights replaced by what they dequantize to."""
    pipeline = load(source)
    for name, layers in verify(checkpoint).layers.items():
        tensors = open_model(checkpoint).components[name].tensors
        for layer in layers:
            packed = {key: read_tensor(tensors[f"{layer.name}.{key}"]) for key in ("qweight", "scales", "qzeros")}
            module = getattr(pipeline, name).get_submodule(layer.name)
            module.weight.data = dequantize(packed, layer.scheme, module.weight.dtype)
    return pipeline


@every_family
@pytest.mark.parametrize("overrides", [(), TUNED], ids=["rounded", "tuned"])
def test_the_layers_of_the_blocks_are_packed_and_no_others(quantized, tiny_model, model, overrides):
    result = quantized(model, *overrides)
    check = verify(result.output, source=tiny_model(model))
    assert check.problems == []
    packed = {name: {layer.name for layer in layers} for name, layers in check.layers.items()}
    assert packed == CASES[model].layers
    for name in packed:
        assert (result.output / name / "diffusion_pytorch_model.safetensors").is_file()
    blocks = {(loss["component"], loss["block"]) for loss in manifest(result.output)["block_losses"]}
    tuned = {(part, ".".join(name.split(".")[:2])) for part, names in packed.items() for name in names}
    assert blocks == (tuned if overrides else set())


@every_family
@pytest.mark.parametrize("overrides", [(), TUNED], ids=["rounded", "tuned"])
def test_it_generates_what_the_dequantized_reference_does(quantized, prepared, tiny_model, model, overrides, shows):
    run = prepared(model)
    checkpoint = quantized(model, *overrides).output
    expected_pictures, expected = generate(dequantized(tiny_model(model), checkpoint), run)
    pictures, latents = generate(load(checkpoint, backend="reference"), run)
    assert torch.isfinite(pictures).all()
    assert torch.equal(latents, expected)
    assert torch.equal(pictures, expected_pictures)
    _, fast = generate(load(checkpoint), run)
    assert torch.linalg.vector_norm(fast.float() - expected.float()) < 0.02 * torch.linalg.vector_norm(
        expected.float()
    )
    shows(CASES[model].family, "tuned" if overrides else "rtn", "load", "generate")


@every_family
def test_the_unquantized_pipeline_generates_and_differs_from_the_quantized(quantized, prepared, tiny_model, model):
    run = prepared(model)
    pipeline = load(tiny_model(model))
    pictures, latents = generate(pipeline, run)
    assert torch.isfinite(pictures).all()
    assert pictures.float().std() > 0.01
    assert not torch.equal(generate(pipeline, run, seed=4)[1], latents)
    assert not torch.equal(generate(load(quantized(model).output), run)[1], latents)


@every_family
def test_tuning_changes_every_component(quantized, model):
    rounded, tuned = quantized(model).output, quantized(model, *TUNED).output
    for name in CASES[model].layers:
        one, other = (open_model(folder).components[name].tensors for folder in (rounded, tuned))
        assert any(
            not torch.equal(read_tensor(one[key]), read_tensor(other[key])) for key in one if "qweight" in key
        )


@every_family
def test_calibration_caches_what_was_estimated(quantized, prepared, model):
    estimate = prepared(model, *TUNED).memory.cached_nbytes
    assert manifest(quantized(model, *TUNED).output)["run"]["cached_bytes"] == pytest.approx(estimate, rel=0.1)


@every_family
def test_everything_else_is_the_source_bit_for_bit(quantized, tiny_model, model):
    source, checkpoint = tiny_model(model), quantized(model).output
    compared = 0
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name.parts[0] not in CASES[model].layers:
            assert (checkpoint / name).read_bytes() == path.read_bytes(), name
            assert stat.S_IMODE((checkpoint / name).stat().st_mode) == stat.S_IMODE(path.stat().st_mode), name
            compared += 1
    assert compared > 5


@every_family
def test_after_loading_no_layer_is_missing_and_float32_stays(quantized, tiny_model, model):
    pipeline = load(quantized(model).output)
    original = load(tiny_model(model))
    for name, layers in CASES[model].layers.items():
        component, reference = getattr(pipeline, name), getattr(original, name)
        packed = {path for path, module in component.named_modules() if isinstance(module, W4A16Linear)}
        assert packed == layers
        for path, tensor in reference.named_parameters():
            if path.removesuffix(".weight") in layers or path.removesuffix(".bias") in layers:
                continue
            mine = component.get_parameter(path)
            assert mine.dtype == tensor.dtype, path
            assert torch.equal(mine, tensor), path
    if model.startswith("wan"):
        component = pipeline.transformer
        assert component.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert component.scale_shift_table.dtype == torch.float32
        assert component.blocks[0].norm2.weight.dtype == torch.float32
        assert component.condition_embedder.time_proj.weight.dtype == torch.bfloat16


@every_family
def test_no_loader_looks_for_packed_layers_outside_the_blocks(quantized, model):
    from quantkit_runtime.config import QuantizationConfig

    for name in CASES[model].layers:
        component = open_model(quantized(model).output).components[name]
        config = QuantizationConfig.from_dict(component.quantization)
        kept = [key.removesuffix(".weight") for key in component.tensors if key.endswith(".weight")]
        assert [
            key for key in kept if config.scheme_for(key) is not None and "norm" not in key.split(".")[-1]
        ] == []
        assert any(key.startswith(NEVER_PACKED) or "time_embedder" in key for key in kept)


def test_the_command_line_needs_no_word_about_the_family(recipes, tiny_model, tmp_path, monkeypatch, capsys):
    from quantkit.cli.main import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (None, 0)
        return capsys.readouterr().out

    for model, case in CASES.items():
        output = tmp_path / model
        shown = run("quantize", "--recipe", recipes[model], "--model", tiny_model(model), "--output", output)
        assert f"{sum(map(len, case.layers.values()))} layers packed and verified" in shown
        run("verify", output, "--source", tiny_model(model))
        assert "W4 g64 sym" in run("inspect", output)


# What is particular to one family.


def test_each_expert_can_have_its_own_scheme(quantized, tiny_model):
    overrides = [{"match": "transformer_2.blocks.*", "bits": 8}, {"match": "transformer.*.ffn.*", "keep": True}]
    result = quantized("wan_t2v", *TUNED, f"layers.overrides={json.dumps(overrides)}")
    check = verify(result.output, source=tiny_model("wan_t2v"))
    assert check.problems == []
    assert {layer.name for layer in check.layers["transformer"]} == {name for name in WAN if ".ffn." not in name}
    assert {layer.scheme.bits for layer in check.layers["transformer"]} == {4}
    assert {layer.name for layer in check.layers["transformer_2"]} == WAN
    assert {layer.scheme.bits for layer in check.layers["transformer_2"]} == {8}


def test_one_expert_alone_can_be_quantized(quantized, tiny_model):
    result = quantized("wan_t2v", "layers.components=[transformer_2]")
    check = verify(result.output, source=tiny_model("wan_t2v"))
    assert check.problems == []
    assert {name: len(layers) for name, layers in check.layers.items()} == {"transformer_2": len(WAN)}


def test_calibration_that_leaves_an_expert_idle_is_refused(prepared):
    with pytest.raises(RecipeError, match=r"num_inference_steps: 1 leaves transformer_2 without a step"):
        prepared("wan_t2v", *TUNED, "calibration.num_inference_steps=1")


def test_image_to_video_starts_from_the_picture(prepared, tiny_model):
    run = prepared("wan_i2v")
    pipeline = load(tiny_model("wan_i2v"))
    pictures = run.loaded.path.parent
    _, red = generate(pipeline, run)
    (pictures / "red.png").rename(pictures / "kept.png")
    try:
        (pictures / "red.png").write_bytes((pictures / "blue.png").read_bytes())
        _, blue = generate(pipeline, run)
    finally:
        (pictures / "kept.png").replace(pictures / "red.png")
    assert not torch.equal(red, blue)


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ("caption\na\nb\n", "starts from a picture, and the prompt 'a' has none"),
        ("caption\timage\na\tcaptions.tsv\nb\tcaptions.tsv\n", "captions.tsv: is no picture"),
    ],
)
def test_calibration_of_image_to_video_without_pictures_is_refused(prepared, tmp_path, captions, reason):
    (tmp_path / "captions.tsv").write_text(captions, encoding="utf-8")
    with pytest.raises(RecipeError, match=reason):
        prepared("wan_i2v", *TUNED, f"calibration.prompts={tmp_path / 'captions.tsv'}")


def test_a_data_set_that_autoround_reads_brings_its_pictures(quantized, recipes, tiny_model):
    captions = recipes["wan_i2v"].parent / "captions.tsv"
    result = quantized("wan_i2v", *TUNED, "calibration.prompts=null", f"calibration.dataset={captions}")
    assert len(manifest(result.output)["block_losses"]) == 4
    assert verify(result.output, source=tiny_model("wan_i2v")).problems == []


def test_a_run_killed_in_the_second_expert_goes_on_there(quantized, prepared, tmp_path, monkeypatch, shows):
    with monkeypatch.context() as patch:
        killer = Path(__file__).parent / "killer"
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(killer), os.environ.get("PYTHONPATH")))))
        patch.setenv("QUANTKIT_TEST_KILL", "2:after:self")
        with pytest.raises(QuantizationError, match="its process ended with code -9"):
            quantize(prepared("wan_t2v", *TUNED), tmp_path / "out")
    resumed = quantize(prepared("wan_t2v", *TUNED), tmp_path / "out")
    assert resumed.tuned.resumed == 3
    for name in ("transformer", "transformer_2"):
        weights = f"{name}/diffusion_pytorch_model.safetensors"
        uninterrupted = quantized("wan_t2v", *TUNED).output / weights
        assert (resumed.output / weights).read_bytes() == uninterrupted.read_bytes()
    shows("wan2.2-t2v", "resume")


@pytest.mark.parametrize("model", [model for model in CASES if model != "wan_t2v"])
def test_a_run_that_fails_goes_on_after_the_last_block(quantized, prepared, tmp_path, model, shows):
    resumed = interrupted_and_resumed(prepared(model, *TUNED), tmp_path / "out")
    uninterrupted = quantized(model, *TUNED).output
    weights = [path.relative_to(resumed.output) for path in resumed.output.rglob("*.safetensors")]
    assert weights
    for path in weights:
        assert (resumed.output / path).read_bytes() == (uninterrupted / path).read_bytes(), path
    shows(CASES[model].family, "resume")


def test_the_autoregressive_stage_is_packed_on_request(quantized, prepared, tiny_model):
    both = "layers.components=[transformer, vision_language_encoder]"
    result = quantized("glm_image", both)
    check = verify(result.output, source=tiny_model("glm_image"))
    assert check.problems == []
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    expected = in_blocks("model.language_model.layers", *names, "mlp.down_proj")
    assert {layer.name for layer in check.layers["vision_language_encoder"]} == expected
    assert (result.output / "vision_language_encoder" / "model.safetensors").is_file()
    run = prepared("glm_image")
    _, latents = generate(load(result.output, backend="reference"), run)
    _, expected = generate(dequantized(tiny_model("glm_image"), result.output), run)
    assert torch.equal(latents, expected)


def test_blocks_return_what_the_family_says(tiny_model):
    from quantkit.families.registry import get_family

    [block] = load(tiny_model("glm_image")).transformer.transformer_blocks[:1]
    [(name, outputs)] = get_family("glm-image").block_outputs.items()
    assert type(block).__name__ == name
    inputs = {"hidden_states": torch.randn(1, 16, 128), "encoder_hidden_states": torch.randn(1, 3, 128)}
    inputs = {key: value.bfloat16() for key, value in inputs.items()}
    returned = block(**inputs, temb=torch.randn(1, 64).bfloat16())
    assert [tensor.shape for tensor in returned] == [inputs[key].shape for key in outputs]


def test_tuning_the_autoregressive_stage_is_refused(prepared):
    with pytest.raises(
        RecipeError, match=r"vision_language_encoder can only be rounded to nearest; set scheme\.iters"
    ):
        prepared("glm_image", *TUNED, "layers.components=[vision_language_encoder]")


def test_a_component_that_the_family_does_not_quantize_is_refused(prepared):
    with pytest.raises(RecipeError, match=r"glm-image quantizes transformer, vision_language_encoder, not vae"):
        prepared("glm_image", "layers.components=[vae]")


def test_a_published_recipe_exists_for_every_family():
    from quantkit.families.registry import family_names, get_family
    from quantkit.recipe.locate import data_dir, list_recipes

    recipes = {name: load_recipe(path).recipe for name, path in list_recipes().items()}
    assert {recipe.model.family for recipe in recipes.values()} >= set(family_names())
    listed = Path(data_dir("recipes") / "README.md").read_text(encoding="utf-8")
    for name, recipe in recipes.items():
        family = get_family(recipe.model.family)
        assert recipe.model.task == family.task
        family.sampling_for(recipe.sampling, recipe.calibration)
        assert f"`{name}`" in listed
