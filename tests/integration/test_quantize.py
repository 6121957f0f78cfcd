"""Quantizing the tiny pipeline end to end: what comes out, and that it comes out the same again."""

import json
import re
import stat

import pytest
import torch

from quantkit.checkpoint import open_model
from quantkit.quantize.hashes import hash_file
from quantkit.quantize.verify import verify

TUNED = ("scheme.iters=6", "scheme.lr=0.1")  # with fewer steps rounding to nearest may stay the best


@pytest.fixture(scope="module")
def tuned_checkpoint(quantize_tiny, tmp_path_factory):
    return quantize_tiny(tmp_path_factory.mktemp("checkpoints") / "tuned", *TUNED)


def weight_hashes(folder):
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_rounding_twice_gives_the_same_bytes(quantize_tiny, rtn_checkpoint, tmp_path):
    again = quantize_tiny(tmp_path / "again").output
    assert weight_hashes(again) == weight_hashes(rtn_checkpoint)
    assert len(weight_hashes(again)) == 4


def test_tuning_twice_gives_the_same_bytes_and_others_than_rounding(
    quantize_tiny, tuned_checkpoint, rtn_checkpoint, tmp_path
):
    again = quantize_tiny(tmp_path / "again", *TUNED).output
    assert weight_hashes(again) == weight_hashes(tuned_checkpoint.output)
    assert weight_hashes(again) != weight_hashes(rtn_checkpoint)


def test_tuning_reports_every_block_and_verifies(tuned_checkpoint, flux_model):
    blocks = [
        f"{kind}.{index}" for kind in ("transformer_blocks", "single_transformer_blocks") for index in range(2)
    ]
    assert [loss.block for loss in tuned_checkpoint.tuned.losses] == blocks
    assert verify(tuned_checkpoint.output, source=flux_model).problems == []


def test_the_manifest_states_recipe_plan_sizes_and_every_file(rtn_checkpoint, quantize_tiny):
    manifest = json.loads((rtn_checkpoint / "quantkit.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["recipe"]["sha256"] == hash_file(quantize_tiny.recipe)
    assert manifest["source"] == {"id": "tiny-flux", "revision": None}
    assert len(manifest["plan"]["transformer"]["layers"]) == 40
    files = {str(path.relative_to(rtn_checkpoint)) for path in rtn_checkpoint.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"quantkit.json"}
    assert {"torch", "diffusers", "auto-round", "quantkit"} <= manifest["versions"].keys()
    assert str(rtn_checkpoint.parent) not in (rtn_checkpoint / "quantkit.json").read_text()


def test_the_model_card_has_the_block_that_hubs_read(rtn_checkpoint):
    import yaml

    text = (rtn_checkpoint / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert "w4a16" in metadata["tags"]


def test_the_card_of_a_mixed_scheme_names_every_scheme(quantize_tiny, tmp_path):
    text = "layers.overrides=[{match: '*.to_q', bits: 8, group_size: 32}]"
    card = (quantize_tiny(tmp_path / "out", text).output / "README.md").read_text()
    assert "# tiny-flux, W4A16 and W8A16\n" in card
    assert "- w4a16\n- w8a16\n" in card
    found = re.search(
        r"with 4-bit weights, group size 64, symmetric \((\d+) layers\) and 8-bit weights, "
        r"group size 32, symmetric \((\d+) layers\);",
        card,
    )
    assert sum(map(int, found.groups())) == 40


def test_card_and_inspect_name_what_was_set_on_top_of_the_recipe(quantize_tiny, tmp_path, capsys):
    from quantkit.cli.inspect import command

    text = "layers.exclude=['*.to_q']"
    output = quantize_tiny(tmp_path / "out", text, "scheme.sym=false").output
    assert f"`) with `{text}`, `scheme.sym=false`, seed 42" in (output / "README.md").read_text()
    command(str(output))
    assert f") with --set {text} --set scheme.sym=false\n" in capsys.readouterr().out


def test_predicted_bytes_are_the_written_bytes(quantize_tiny, tmp_path):
    result = quantize_tiny(tmp_path / "out", "scheme.bits=8", "layers.exclude=['*.to_q']")
    [part] = result.plan.components
    written = open_model(result.output).components["transformer"].tensors
    assert sum(info.nbytes for info in written.values()) == part.nbytes_after


def test_what_is_not_quantized_is_the_sources_weights_linked_and_small_files_copied(rtn_checkpoint, flux_model):
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"):
        assert [path.name for path in sorted((rtn_checkpoint / name).iterdir())] == [
            path.name for path in sorted((flux_model / name).iterdir())
        ]
        for path in (rtn_checkpoint / name).iterdir():
            source = flux_model / name / path.name
            assert path.read_bytes() == source.read_bytes()
            # People edit configurations in place; that must not reach the source.
            assert path.samefile(source) == (path.suffix == ".safetensors")


def test_every_file_that_is_written_is_readable_by_everyone(rtn_checkpoint):
    written = [path for path in rtn_checkpoint.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert {"quantkit.json", "README.md", "config.json"} < {path.name for path in written}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {0o644}


@pytest.mark.parametrize("path", [".", "transformer"])
def test_the_folders_can_be_entered_by_everyone(rtn_checkpoint, path):
    assert stat.S_IMODE((rtn_checkpoint / path).stat().st_mode) & 0o055 == 0o055


def test_a_sharded_export_holds_the_same_tensors(quantize_tiny, rtn_checkpoint, flux_model, tmp_path):
    output = quantize_tiny(tmp_path / "sharded", "export.max_shard_size=300KB").output
    sharded = open_model(output).components["transformer"]
    assert len(sharded.weight_files) > 3
    assert all(path.stat().st_size < 330_000 for path in sharded.weight_files)
    assert verify(output, source=flux_model).problems == []
    assert_same_tensors(sharded, open_model(rtn_checkpoint).components["transformer"])
    index = json.loads((output / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in sharded.tensors.values())


def assert_same_tensors(one, other):
    from quantkit.quantize.tensors import read_tensor

    assert one.tensors.keys() == other.tensors.keys()
    for name, info in one.tensors.items():
        assert torch.equal(read_tensor(info), read_tensor(other.tensors[name])), name


def test_a_sharded_source_gives_the_same_tensors(quantize_tiny, rtn_checkpoint, flux_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source = shutil.copytree(flux_model, tmp_path / "source")
    single = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names[number::2], file)
        save_file({name: tensors[name] for name in names[number::2]}, source / "transformer" / file)
    (source / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    output = quantize_tiny(tmp_path / "out", source=source).output
    assert not (output / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").exists()
    assert_same_tensors(*(open_model(folder).components["transformer"] for folder in (output, rtn_checkpoint)))


@pytest.mark.parametrize("iters", [0, 1])
def test_a_mixed_scheme_is_written_as_planned(quantize_tiny, flux_model, tmp_path, iters):
    output = quantize_tiny(
        tmp_path / "mixed",
        f"scheme.iters={iters}",
        "layers.overrides=[{match: '*.attn.to_q', bits: 8}, {match: transformer_blocks.0.ff.net.2, keep: true}]",
    ).output
    result = verify(output, source=flux_model)
    assert result.problems == []
    bits = {layer.name: layer.scheme.bits for layer in result.layers["transformer"]}
    assert len(bits) == 39
    assert {name for name, value in bits.items() if value == 8} == {
        name for name in bits if name.endswith("attn.to_q")
    }
    kept = open_model(output).components["transformer"].tensors["transformer_blocks.0.ff.net.2.weight"]
    assert kept.dtype == "BF16"


def test_overwrite_replaces_a_checkpoint_and_nothing_else_is_left(quantize_tiny, tmp_path):
    output = tmp_path / "out"
    quantize_tiny(output)
    quantize_tiny(output, "scheme.bits=8", overwrite=True)
    assert json.loads((output / "transformer" / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overrides", [(), TUNED], ids=["rtn", "tuned"])
def test_a_checkpoint_draws_what_its_dequantized_weights_draw(
    overrides, rtn_checkpoint, tuned_checkpoint, flux_model, shows
):
    from quantkit_runtime import load_pipeline
    from quantkit_runtime.format import dequantize

    checkpoint = tuned_checkpoint.output if overrides else rtn_checkpoint
    packed = open_model(checkpoint).components["transformer"]
    reference = load_pipeline(flux_model, device="cpu", dtype=torch.float32)
    weights = dict(reference.transformer.named_parameters())
    from quantkit.quantize.tensors import read_tensor

    for layer in verify(checkpoint).layers["transformer"]:
        tensors = {name.rpartition(".")[2]: read_tensor(packed.tensors[name]) for name in layer.tensors}
        weights[f"{layer.name}.weight"].data = dequantize(tensors, layer.scheme, torch.float32)
    candidate = load_pipeline(checkpoint, device="cpu", dtype=torch.float32)
    latents = [draw(pipeline) for pipeline in (reference, candidate)]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-3, atol=1e-3)
    shows("flux", "tuned" if overrides else "rtn", "load", "generate")


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize(
    "overrides",
    [
        ("scheme.sym=false",),
        ("scheme.group_size=-1",),
        ("scheme.bits=2",),
        ("scheme.bits=3", "scheme.group_size=32"),
        ("layers.include=['single_transformer_blocks.*']",),
        (
            "scheme.iters=1",
            "layers.overrides=[{match: '*.to_q', sym: false}, {match: '*_k', bits: 2}, {match: '*_v', bits: 3}]",
        ),
    ],
    ids=str,
)
def test_every_scheme_that_a_recipe_can_ask_for_verifies(quantize_tiny, flux_model, tmp_path, overrides):
    result = quantize_tiny(tmp_path / "out", *overrides)
    [part] = result.plan.components
    checked = verify(result.output, source=flux_model, planned={"transformer": list(part.layers)})
    assert checked.problems == []
    assert len(checked.errors) == len(part.layers)
