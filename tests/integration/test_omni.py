"""Qwen2.5-Omni and Qwen3-Omni, tiny and random: quantize, verify, load, compute, write text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import servability_peer
import tiny_omni
import torch
from interrupted import interrupted_and_resumed
from PIL import Image

import quantkit_runtime
from quantkit.checkpoint import open_model
from quantkit.compare.request import Request
from quantkit.compare.run import compare
from quantkit.errors import QuantizationError, RecipeError
from quantkit.families.registry import detect
from quantkit.inspect.servability import check_servability
from quantkit.quantize.plan import make_plan
from quantkit.quantize.run import prepare, quantize
from quantkit.quantize.tensors import read_tensor
from quantkit.quantize.verify import verify
from quantkit.recipe import load_recipe
from quantkit.recipe.locate import find_prompts
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling
from quantkit_runtime import W4A16Experts, W4A16Linear
from quantkit_runtime.config import QuantizationConfig
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.format import dequantize
from quantkit_runtime.names import CheckpointNames

LAYER = "thinker.model.layers.{}."
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
PLANNED = {
    "qwen2.5-omni": [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen3-omni": [
        *ATTENTION,
        *(f"mlp.experts.{expert}.{name}_proj" for expert in range(4) for name in ("gate", "up", "down")),
    ],
}
FAMILIES = list(PLANNED)
RECIPE = """\
version: 1
model: {id: tiny-omni, task: chat}
scheme: {iters: 0, lr: 0.02, group_size: 64, nsamples: 6, batch_size: 2, seqlen: 512}
calibration: {prompts: omni-calibration.jsonl}
export: {max_shard_size: 700KB}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of each family's tiny model; tests must not change it."""
    folder = tmp_path_factory.mktemp("omni")
    builders = {"qwen2.5-omni": tiny_omni.build_qwen2_5_omni, "qwen3-omni": tiny_omni.build_qwen3_omni}
    return {name: build(folder / name) for name, build in builders.items()}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Quantize a folder with the recipe of this module and overrides."""
    recipe = tmp_path_factory.mktemp("recipe") / "omni.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")

    def run(source, output, *overrides):
        return quantize(prepare(load_recipe(recipe, overrides), source), output)

    run.recipe = recipe
    return run


@pytest.fixture(scope="session")
def rounded(models, run, tmp_path_factory):
    """Checkpoint of each family, rounded to nearest."""
    folder = tmp_path_factory.mktemp("rounded")
    return {name: run(source, folder / name).output for name, source in models.items()}


@pytest.fixture(scope="session")
def tuned(models, run, tmp_path_factory):
    """What quantizing with four steps of tuning returned for each family; one layer is excluded."""
    folder = tmp_path_factory.mktemp("tuned")
    keep = '["thinker.model.layers.1.self_attn.o_proj"]'
    return {
        name: run(source, folder / name, "scheme.iters=4", f"layers.exclude={keep}")
        for name, source in models.items()
    }


def component(folder):
    return open_model(folder).components["model"]


def assert_untouched(source, checkpoint, packed):
    """Every tensor but the packed layers' weights is in the checkpoint, bit for bit, and nothing else is."""
    before, after = component(source).tensors, component(checkpoint).tensors
    kept = before.keys() - {f"{layer}.weight" for layer in packed}
    assert {name for name in after if not name.endswith((".qweight", ".qzeros", ".scales"))} == kept
    for name in kept:
        was, now = read_tensor(before[name]), read_tensor(after[name])
        assert was.dtype == now.dtype, name
        assert torch.equal(was.view(-1).view(torch.uint8), now.view(-1).view(torch.uint8)), name


def inputs_of(source, conversation):
    """What the thinker reads of one of the shipped conversations."""
    family = detect(source)
    sample = family.read_calibration(find_prompts("omni-calibration.jsonl", None))[conversation]
    return family.tokenize(family.load_processor(source), sample, 512)


def dequantized(source, checkpoint):
    """The source's model with the weights that the checkpoint stands for."""
    model = quantkit_runtime.load_model(source)
    part = component(checkpoint)
    config = QuantizationConfig.from_dict(part.quantization)
    names = CheckpointNames(model)
    parameters = dict(model.named_parameters())
    for tensor in part.tensors:
        layer, _, suffix = tensor.rpartition(".")
        if suffix != "qweight":
            continue
        stored = {key: read_tensor(part.tensors[f"{layer}.{key}"]) for key in ("qweight", "qzeros", "scales")}
        weight = dequantize(stored, config.scheme_for(layer), torch.bfloat16)
        place = names.place(f"{layer}.weight")
        target = parameters[place.name]
        with torch.no_grad():
            if place.pattern is None:
                target.copy_(weight)
                continue
            _, expert, projection = layer.rsplit(".", 2)
            half = target.shape[1] // 2
            rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None), "down_proj": slice(None)}[projection]
            target[int(expert), rows] = weight
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_the_thinkers_language_model_and_nothing_else(models, run, name):
    source = open_model(models[name])
    family = detect(source)
    assert family.name == name
    [part] = make_plan(source, family, load_recipe(run.recipe, ()).recipe).components
    wanted = {LAYER.format(block) + layer for block in range(2) for layer in PLANNED[name]}
    assert {layer.name for layer in part.layers} == wanted
    kept = dict(part.kept)
    routers = {f"thinker.model.layers.{block}.mlp.gate" for block in range(2)} if name == "qwen3-omni" else set()
    assert set(part.kept_in_blocks) == routers
    assert {kept[router] for router in routers} <= {"a router"}
    for stage in ("talker.", "thinker.visual.", "thinker.audio_tower.", "thinker.lm_head"):
        assert any(layer.startswith(stage) for layer in kept), stage


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_says_so_where_every_loader_looks(models, rounded, name):
    config = json.loads((rounded[name] / "config.json").read_text())
    stated = config["quantization_config"]
    assert config["thinker_config"]["text_config"]["quantization_config"] == stated
    assert stated["block_name_to_quantize"] == "thinker.model.layers,thinker.model.language_model.layers"
    routers = {
        f"thinker.model.{home}layers.{block}.mlp.gate": {"bits": 16, "data_type": "float"}
        for home in ("", "language_model.")
        for block in range(2)
    }
    assert stated.get("extra_config", {}) == (routers if name == "qwen3-omni" else {})
    del config["quantization_config"], config["thinker_config"]["text_config"]["quantization_config"]
    assert config == json.loads((models[name] / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_talker_towers_heads_routers_and_other_files_stay_as_they_are(models, rounded, name):
    assert_untouched(
        models[name], rounded[name], {LAYER.format(block) + layer for block in range(2) for layer in PLANNED[name]}
    )
    for path in models[name].iterdir():
        if not path.name.startswith(("model", "config.json")):
            assert (rounded[name] / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_checkpoint_verifies_against_its_source(models, rounded, name):
    result = verify(rounded[name], source=models[name])
    assert result.problems == []
    assert len(result.layers["model"]) == 2 * len(PLANNED[name])


def test_a_changed_speaker_file_fails_the_verification(models, rounded, tmp_path):
    folder = shutil.copytree(rounded["qwen2.5-omni"], tmp_path / "changed")
    (folder / "quantkit.json").unlink()
    (folder / "spk_dict.pt").write_bytes(b"x")
    problems = verify(folder, source=models["qwen2.5-omni"]).problems
    assert problems == [f"{folder / 'spk_dict.pt'}: differs from the source and is not quantized"]


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_text_image_and_audio_give_the_dequantized_models_logits(models, rounded, name, shows):
    reference = dequantized(models[name], rounded[name])
    packed = quantkit_runtime.load_model(rounded[name], backend="reference")
    inputs = inputs_of(models[name], 3)
    assert {"input_ids", "pixel_values", "input_features"} <= inputs.keys()
    wanted, found = reference.thinker(**inputs).logits.float(), packed.thinker(**inputs).logits.float()
    error = torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)
    assert torch.isfinite(found).all()
    assert error < 0.01  # fused experts sum in another order; the rest is bit-equal
    if name == "qwen2.5-omni":
        assert torch.equal(found, wanted)
    shows(name, "rtn", "load")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_not_packed_is_loaded_as_transformers_loads_it(models, rounded, name):
    reference, packed = quantkit_runtime.load_model(models[name]), quantkit_runtime.load_model(rounded[name])
    kinds = {type(module) for module in packed.modules()} & {W4A16Linear, W4A16Experts}
    assert kinds == ({W4A16Linear} if name == "qwen2.5-omni" else {W4A16Linear, W4A16Experts})
    wanted = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    found = {**dict(packed.named_parameters()), **dict(packed.named_buffers())}
    blocks = "thinker.model.language_model.layers."
    outside = {key for key in wanted if not key.startswith(blocks)}
    assert outside == {key for key in found if not key.startswith(blocks)}
    for key in outside:
        assert wanted[key].dtype == found[key].dtype, key
        assert torch.equal(wanted[key], found[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_loading_a_packed_model_leaves_later_loads_alone(models, rounded, name):
    before = quantkit_runtime.load_model(models[name]).state_dict()
    quantkit_runtime.load_model(rounded[name])
    after = quantkit_runtime.load_model(models[name]).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_of_a_loaded_model_is_the_checkpoints(rounded, name):
    packed = quantkit_runtime.load_model(rounded[name])
    names, state = CheckpointNames(packed), packed.state_dict()
    for tensor, info in component(rounded[name]).tensors.items():
        layer, _, suffix = tensor.rpartition(".")
        if suffix in ("qweight", "qzeros", "scales"):
            assert torch.equal(state[f"{names.module(layer)}.{suffix}"], read_tensor(info)), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_text(models, rounded, name, shows):
    packed = quantkit_runtime.load_model(rounded[name])
    inputs = inputs_of(models[name], 3)
    options = {"thinker_max_new_tokens": 6, "thinker_do_sample": False, "thinker_eos_token_id": -1}
    written = packed.generate(**inputs, generation_mode="text", **options)
    assert written.shape == (1, inputs["input_ids"].shape[1] + 6)
    if name == "qwen2.5-omni":
        same = dequantized(models[name], rounded[name]).generate(**inputs, generation_mode="text", **options)
        assert torch.equal(written, same)
    shows(name, "generate")


@pytest.mark.parametrize("name", FAMILIES)
def test_it_can_be_served(rounded, name, shows):
    errors = {
        target: {found.rule for found in check_servability(rounded[name], target) if found.severity == "error"}
        for target in ("vllm-omni", "transformers")
    }
    # transformers loses the talker's 16-bit experts when it loads packed layers.
    assert errors == {"vllm-omni": set(), "transformers": {"experts-lost"} if name == "qwen3-omni" else set()}
    shows(name, *(target for target, found in errors.items() if not found))


@torch.inference_mode()
def test_transformers_computes_what_our_runtime_does(models, rounded, tmp_path):
    class_name = "Qwen2_5OmniForConditionalGeneration"
    inputs = inputs_of(models["qwen2.5-omni"], 3)
    torch.save(inputs, tmp_path / f"{class_name}.pt")
    peer = [sys.executable, servability_peer.__file__, "thinker", rounded["qwen2.5-omni"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([*peer, tmp_path / f"{class_name}.pt", tmp_path / "out.pt"], check=True, env=environment)
    theirs = torch.load(tmp_path / "out.pt").float()
    ours = quantkit_runtime.load_model(rounded["qwen2.5-omni"]).thinker(**inputs).logits.float()
    assert torch.linalg.vector_norm(ours - theirs) < 0.02 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_to_text_and_picture_are_compared_with_the_reference(models, rounded, name, tmp_path, shows):
    picture = tmp_path / "square.png"
    Image.new("RGB", (56, 56), "red").save(picture)
    prompts = (Prompt("What is in this picture?", str(picture)), Prompt("Count to three."))
    asked = Sampling(max_new_tokens=6)
    request = Request(models[name], rounded[name], prompts, (0,), task="chat", sampling=(asked,), device="cpu")
    result = compare(request, tmp_path / "result")
    assert result.family == name
    assert result.noise_floor.metrics["token_agreement"] == 1
    assert all(0 <= item.metrics["token_agreement"] <= 1 < 1 + item.metrics["token_kl"] for item in result.items)
    shows(name, "compare")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_in_the_stages_section_alone_is_enough(rounded, tmp_path, name):
    folder = shutil.copytree(rounded[name], tmp_path / "nested")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert any(isinstance(module, W4A16Linear) for module in quantkit_runtime.load_model(folder).modules())
    config["quantization_config"] = {"quant_method": "auto-round", "bits": 8, "group_size": 64, "sym": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match=r"text_config\.quantization_config: differs from quant"):
        quantkit_runtime.load_model(folder)


def test_a_lost_expert_is_named(rounded, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(rounded["qwen3-omni"], tmp_path / "lost")
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    lost = tensors.pop("thinker.model.layers.1.mlp.experts.2.up_proj.scales")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointFormatError, match=r"1\.mlp\.experts\.2\.up_proj\.scales: missing from the weights"
    ):
        quantkit_runtime.load_model(folder)
    tensors["thinker.model.layers.1.mlp.experts.2.up_proj.scales"] = lost
    del tensors["thinker.model.layers.1.mlp.experts.2.up_proj.qweight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointFormatError, match="experts of a layer are stored in several ways"):
        quantkit_runtime.load_model(folder)


@pytest.mark.parametrize(
    "override",
    [
        'layers.exclude=["*.experts.1.*"]',
        'layers.overrides=[{"match": "*.layers.0.mlp.experts.*.down_proj", "bits": 8}]',
    ],
)
def test_experts_of_one_layer_are_stored_alike_or_not_at_all(models, run, override):
    with pytest.raises(
        RecipeError, match=r"layers: thinker\.model\.layers\.0\.mlp\.experts\.\d\.\w+ would be stored"
    ):
        prepare(load_recipe(run.recipe, (override,)), models["qwen3-omni"])


def test_all_experts_of_a_layer_may_stay(models, run, tmp_path):
    keep = 'layers.exclude=["thinker.model.layers.0.mlp.experts.*"]'
    folder = run(models["qwen3-omni"], tmp_path / "out", keep).output
    packed = quantkit_runtime.load_model(folder)
    assert sum(isinstance(module, W4A16Experts) for module in packed.modules()) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_tuning_reads_conversations_and_changes_the_planned_layers_alone(models, rounded, tuned, name):
    result = tuned[name]
    [part] = result.plan.components
    packed = {layer.name for layer in part.layers}
    assert len(packed) == 2 * len(PLANNED[name]) - 1
    assert_untouched(models[name], result.output, packed)
    losses = result.tuned.losses
    assert len(losses) == 2
    assert all(loss.before > 0 and loss.after > 0 for loss in losses)
    nearest, now = component(rounded[name]).tensors, component(result.output).tensors
    changed = {
        layer
        for layer in packed
        if not torch.equal(read_tensor(nearest[f"{layer}.qweight"]), read_tensor(now[f"{layer}.qweight"]))
    }
    assert {block for block in range(2) if any(layer.startswith(LAYER.format(block)) for layer in changed)} == {
        0,
        1,
    }
    assert (result.output / "config.json").read_text().count('"iters": 4') == 2
    extra = json.loads((result.output / "config.json").read_text())["quantization_config"]["extra_config"]
    for home in ("thinker.model.", "thinker.model.language_model."):
        assert extra[f"{home}layers.1.self_attn.o_proj"]["bits"] == 16


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_tuned_checkpoint_computes_what_its_weights_say(models, tuned, name, shows):
    inputs = inputs_of(models[name], 5)
    wanted = dequantized(models[name], tuned[name].output).thinker(**inputs).logits.float()
    found = quantkit_runtime.load_model(tuned[name].output, backend="reference").thinker(**inputs).logits.float()
    assert torch.linalg.vector_norm(found - wanted) < 0.01 * torch.linalg.vector_norm(wanted)
    shows(name, "tuned")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_fails_goes_on_after_the_last_block_and_ends_with_the_same_bytes(
    models, run, tuned, tmp_path, family, shows
):
    keep = 'layers.exclude=["thinker.model.layers.1.self_attn.o_proj"]'
    prepared = prepare(load_recipe(run.recipe, ("scheme.iters=4", keep)), models[family])
    result = interrupted_and_resumed(prepared, tmp_path / "out")
    weights = sorted(path.name for path in result.output.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (result.output / name).read_bytes() == (tuned[family].output / name).read_bytes(), name
    shows(family, "resume")


def test_auto_round_is_told_of_all_devices(models, run, tmp_path, monkeypatch):
    import quantkit.quantize.run as module

    def refuse(job, *_rest):
        raise QuantizationError(",".join(job.devices))

    monkeypatch.setattr(module, "resolve_devices", lambda text: tuple(text.split(",")))
    monkeypatch.setattr(module, "cache_fits", lambda *_: False)
    monkeypatch.setattr(module, "tune", refuse)
    prepared = prepare(load_recipe(run.recipe, ("scheme.iters=1",)), models["qwen2.5-omni"])
    with pytest.raises(QuantizationError, match=r"^cuda:0,cuda:1$"):
        quantize(prepared, tmp_path / "out", device="cuda:0,cuda:1")


def test_calibration_caches_what_was_estimated_for_samples_of_full_length(models, run, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(["many words " * 40] * 6))
    overrides = ("scheme.iters=1", "scheme.seqlen=64", f"calibration.prompts={tmp_path / 'long.txt'}")
    prepared = prepare(load_recipe(run.recipe, overrides), models["qwen2.5-omni"])
    result = quantize(prepared, tmp_path / "out")
    assert result.tuned.cached_nbytes == pytest.approx(prepared.memory.cached_nbytes, rel=0.1)


def test_a_conversation_that_is_too_long_is_refused_before_a_weight_is_read(models, run):
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(run.recipe, ("scheme.iters=1", "scheme.seqlen=8")), models["qwen2.5-omni"])
    assert "circle-and-square.png has" in str(caught.value)
    assert "raise scheme.seqlen above its 8" in str(caught.value)


def test_a_sound_of_another_rate_is_refused_with_the_command_that_mends_it(models, tmp_path):
    import wave

    path = tmp_path / "fast.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(b"\0" * 400)
    family = detect(models["qwen2.5-omni"])
    sample = [{"role": "user", "content": [{"type": "audio", "audio": str(path)}]}]
    with pytest.raises(RecipeError, match=r"fast.wav: has 44100 samples a second of 16 bits; convert it to 16000"):
        family.tokenize(family.load_processor(models["qwen2.5-omni"]), sample, 512)


def test_a_picture_that_is_none_is_refused(models, tmp_path):
    path = tmp_path / "note.png"
    path.write_text("no picture")
    family = detect(models["qwen2.5-omni"])
    sample = [{"role": "user", "content": [{"type": "image", "image": str(path)}]}]
    with pytest.raises(RecipeError, match=r"note.png: is no picture"):
        family.tokenize(family.load_processor(models["qwen2.5-omni"]), sample, 512)


@pytest.mark.parametrize("name", FAMILIES)
def test_separated_experts_are_the_fused_ones(models, name):
    model = quantkit_runtime.load_model(models[name])
    inputs = inputs_of(models[name], 4)
    with torch.inference_mode():
        wanted = model.thinker(**inputs).logits.float()
        found = detect(models[name]).text_model(model)(**inputs).logits.float()
    assert torch.linalg.vector_norm(found - wanted) < 0.01 * torch.linalg.vector_norm(wanted)


def test_the_shipped_recipes_fit_their_models(models):
    for name in FAMILIES:
        recipe = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
        prepared = prepare(load_recipe(recipe, ()), models[name])
        assert prepared.family.name == name
        assert len(prepared.plan.components[0].layers) == 2 * len(PLANNED[name])
