"""What the servability check says of real exports is what the loaders of diffusers and transformers do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import servability_peer
import torch
from breakable import Breakable
from servability_peer import draw

from quantkit.families.registry import get_family
from quantkit.inspect.servability import check_natural_targets, check_servability
from quantkit_runtime import load_model, load_pipeline

PEER = Path(servability_peer.__file__)
CLOSE = 0.02  # auto-round's CPU kernel multiplies scales in half precision
BLOCK = "transformer_blocks.0"
# A fused group kept in 16 bit, another in 8 bits, single layers of both kinds.
MIXED = (
    f"layers.exclude=['{BLOCK}.attn.to_[qkv]', 'single_transformer_blocks.1.proj_mlp']",
    f"layers.overrides=[{{match: '{BLOCK}.attn.add_*_proj', bits: 8}}, {{match: '*.to_out.0', group_size: 32}}]",
)


def run_peer(*arguments):
    done = subprocess.run(
        [sys.executable, PEER, *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def distance(one, other):
    return float(torch.linalg.vector_norm(one.float() - other.float()) / torch.linalg.vector_norm(one.float()))


@pytest.fixture(scope="module")
def mixed_checkpoint(quantize_tiny, tmp_path_factory):
    return quantize_tiny(tmp_path_factory.mktemp("mixed") / "flux", *MIXED).output


def errors_of(checkpoint):
    return {
        target: [finding for finding in findings if finding.severity == "error"]
        for target, findings in check_natural_targets(checkpoint).items()
    }


def test_the_embedded_model_quantized_can_be_served(tmp_path, shows):
    import quantkit.demo
    from quantkit.quantize.run import prepare, quantize
    from quantkit.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe("demo-flux"), ["scheme.iters=0"])
    result = quantize(prepare(loaded, quantkit.demo.path()), tmp_path / "out")
    assert errors_of(result.output) == {"vllm-omni": [], "diffusers": []}
    shows("flux", "vllm-omni", "diffusers")


FAMILIES = {
    "wan_t2v": "wan2.2-t2v",
    "wan_i2v": "wan2.2-i2v",
    "wan_ti2v": "wan2.2-ti2v",
    "glm_image": "glm-image",
    "ovis_image": "ovis-image",
}


@pytest.fixture(scope="module")
def quantize_family(tiny_model, tmp_path_factory):
    """Round a family's tiny pipeline to nearest: ``quantize_family("wan_t2v", *overrides)``."""
    from quantkit.quantize.run import prepare, quantize
    from quantkit.recipe import load_recipe

    def run(name, *overrides):
        folder = tmp_path_factory.mktemp(name)
        family = FAMILIES[name]
        task = get_family(family).task
        (folder / "recipe.yaml").write_text(
            f"version: 1\nmodel: {{id: tiny, family: {family}, task: {task}}}\n"
            "scheme: {group_size: 32, iters: 0}\n"
        )
        return quantize(prepare(load_recipe(folder / "recipe.yaml", overrides), tiny_model(name)), folder / "out")

    return run


VIDEO = {"num_frames": 5, "guidance_scale": 3.0}
DRAWN = {
    "wan_t2v": {**VIDEO, "height": 32, "width": 32},
    "wan_ti2v": {**VIDEO, "height": 64, "width": 64},
    "glm_image": {"height": 64, "width": 64},
    "ovis_image": {"height": 32, "width": 32},
}


def test_diffusers_draws_what_our_runtime_does_with_every_family(quantize_family, tmp_path):
    jobs = {
        name: (str(quantize_family(name).output), {"prompt": "a red circle", "num_inference_steps": 2, **arguments})
        for name, arguments in DRAWN.items()
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_peer("pipelines", tmp_path / "jobs.json", tmp_path / "out.pt")
    theirs = torch.load(tmp_path / "out.pt")
    for name, (folder, arguments) in jobs.items():
        ours = draw(load_pipeline(folder, dtype=torch.bfloat16), arguments)
        assert distance(ours, theirs[name]) < CLOSE, name


@pytest.mark.parametrize("name", FAMILIES)
def test_what_quantkit_writes_of_a_family_can_be_served(quantize_family, name, shows):
    result = quantize_family(name)
    errors = errors_of(result.output)
    assert errors["diffusers"] == []
    unsupported = ["architecture-unsupported"] if name == "ovis_image" else []
    assert [finding.rule for finding in errors["vllm-omni"]] == unsupported
    shows(result.plan.family, *(target for target, found in errors.items() if not found))


def test_a_quantized_language_model_inside_a_pipeline_is_a_warning_for_vllm_omni(quantize_family):
    output = quantize_family("glm_image", "layers.components=[transformer, vision_language_encoder]").output
    assert errors_of(output) == {"vllm-omni": [], "diffusers": []}
    found = [finding for finding in check_servability(output, "vllm-omni") if finding.rule == "component"]
    assert [(finding.severity, finding.model) for finding in found] == [("warning", "vision_language_encoder")]


def test_layers_that_vllm_omni_renames_are_excluded_under_both_names(quantize_family):
    result = quantize_family("wan_t2v", "layers.exclude=['*.0.attn1.to_[qkv]', '*.0.*.to_out.0', '*.0.ffn.net.*']")
    assert errors_of(result.output) == {"vllm-omni": [], "diffusers": []}
    for component in ("transformer", "transformer_2"):
        config = json.loads((result.output / component / "config.json").read_text())
        keys = set(config["quantization_config"]["extra_config"])
        members = {f"attn1.to_{letter}" for letter in "qkv"}
        renamed = {"attn1.to_qkv", "attn1.to_out", "attn2.to_out", "ffn.net_0.proj", "ffn.net_2"}
        own = {"attn1.to_out.0", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"}
        assert keys == {f"blocks.0.{name}" for name in members | renamed | own}


def test_float32_modules_of_wan_are_a_warning_for_diffusers(quantize_family):
    findings = check_servability(quantize_family("wan_ti2v").output, "diffusers")
    assert {finding.severity for finding in findings if finding.rule == "float32-modules"} == {"warning"}


def test_findings_go_into_manifest_card_and_result(quantize_tiny, tmp_path):
    result = quantize_tiny(tmp_path / "out", "scheme.bits=2")
    [finding] = [one for one in result.servability["vllm-omni"] if one.severity == "error"]
    assert (finding.rule, finding.count) == ("cuda-scheme", 40)
    manifest = json.loads((result.output / "quantkit.json").read_text())
    assert vars(finding) in manifest["servability"]["vllm-omni"]
    assert not [one for one in manifest["servability"]["diffusers"] if one["severity"] == "error"]
    card = (result.output / "README.md").read_text()
    assert f"| vllm-omni | no: `{finding.where}` and 39 more is W2 g64 sym" in card
    assert "| diffusers | yes |" in card


@pytest.fixture(scope="module")
def loaded_by_diffusers(mixed_checkpoint, flux_inputs, tmp_path_factory):
    """What diffusers with auto-round makes of the mixed export and of copies that the check refuses."""
    folder = tmp_path_factory.mktemp("broken")
    unlisted = Breakable(mixed_checkpoint, folder / "unlisted")
    unlisted.set(block_name_to_quantize="single_transformer_blocks")
    unpacked = Breakable(mixed_checkpoint, folder / "unpacked")
    kept = "single_transformer_blocks.1.proj_mlp"
    extra = {key: value for key, value in unpacked.metadata()["extra_config"].items() if key != kept}
    unpacked.set(extra_config=extra)
    renamed = Breakable(mixed_checkpoint, folder / "renamed")
    renamed.weights.rename(renamed.model / "model.safetensors")
    models = {"sound": mixed_checkpoint, "packed-unlisted": unlisted.folder, "listed-unpacked": unpacked.folder}
    models["weight-names"] = renamed.folder
    torch.save(flux_inputs, folder / "inputs.pt")
    run_peer(
        "transformer", folder / "inputs.pt", folder / "out.pt", *(path / "transformer" for path in models.values())
    )
    results = torch.load(folder / "out.pt")
    return {name: (path, result) for (name, path), result in zip(models.items(), results, strict=True)}


@pytest.fixture(scope="module")
def flux_inputs():
    generator = torch.Generator().manual_seed(3)
    floats = {"hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 8, 64), "pooled_projections": (1, 32)}
    return {
        **{name: torch.randn(*size, generator=generator).bfloat16() for name, size in floats.items()},
        "timestep": torch.tensor([0.7], dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(8, 3),
    }


def test_diffusers_loads_a_mixed_export_and_computes_what_our_runtime_does(loaded_by_diffusers, flux_inputs):
    checkpoint, theirs = loaded_by_diffusers["sound"]
    assert errors_of(checkpoint) == {"vllm-omni": [], "diffusers": []}
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["extra_config"][f"{BLOCK}.attn.to_qkv"]["bits"] == 16
    assert config["extra_config"][f"{BLOCK}.attn.add_kv_proj"]["bits"] == 8
    assert isinstance(theirs, torch.Tensor), theirs
    model = load_model(checkpoint / "transformer", dtype=torch.bfloat16)
    with torch.no_grad():
        assert distance(model(**flux_inputs).sample, theirs) < CLOSE


@pytest.mark.parametrize("rule", ["packed-unlisted", "listed-unpacked", "weight-names"])
def test_what_the_check_refuses_diffusers_does_not_load_or_silently_changes(loaded_by_diffusers, rule):
    checkpoint, result = loaded_by_diffusers[rule]
    assert {finding.rule for finding in errors_of(checkpoint)["diffusers"]} == {rule}
    # The same loader, kernels and inputs: the sound weights would give the same bits.
    assert isinstance(result, str) or not torch.equal(result, loaded_by_diffusers["sound"][1])


def test_transformers_loads_what_autoround_wrote_and_computes_what_our_runtime_does(tmp_path):
    from tiny.tokenizers import t5_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = t5_tokenizer()
    source = tmp_path / "source"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    ids = torch.arange(10).unsqueeze(0)
    torch.save(ids, tmp_path / "ids.pt")
    run_peer("language_model", source, tmp_path / "work", tmp_path / "ids.pt", tmp_path / "out.pt")
    checkpoint, theirs = torch.load(tmp_path / "out.pt")
    findings = check_servability(Path(checkpoint), "transformers")
    assert [finding for finding in findings if finding.severity != "info"] == []
    with torch.no_grad():
        assert distance(load_model(checkpoint, dtype=torch.bfloat16)(ids).logits, theirs) < CLOSE
