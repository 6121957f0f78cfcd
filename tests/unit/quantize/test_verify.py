"""One test per rule of the verification, each with a checkpoint that breaks exactly this rule."""

import json
import shutil

import pytest
import torch

from quantkit.errors import CheckpointError
from quantkit.quantize.verify import verify

LAYER = "transformer_blocks.0.attn.to_q"
OTHER = "transformer_blocks.1.attn.to_q"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(rtn_checkpoint, tmp_path):
    """A copy without the manifest, whose hashes would notice every change."""
    shutil.copytree(rtn_checkpoint, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("quantkit.json"))
    return tmp_path / "checkpoint"


@pytest.fixture
def broken(checkpoint, flux_model):
    """Change the tensors of the copy and return what the verification says, without the file's name."""
    from safetensors.torch import load_file, save_file

    def verify_changed(change, *, source=False):
        tensors = load_file(checkpoint / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint / WEIGHTS)
        result = verify(checkpoint, source=flux_model if source else None)
        return [problem.replace(f"{checkpoint}/", "").replace(f"{WEIGHTS}: ", "") for problem in result.problems]

    return verify_changed


def test_a_sound_checkpoint_has_no_problems_and_all_is_checked(rtn_checkpoint, flux_model):
    result = verify(rtn_checkpoint, source=flux_model)
    assert result.problems == []
    assert len(result.layers["transformer"]) == len(result.errors) == 40
    assert all(0.01 < error.relative_l2 == error.rtn_relative_l2 < 0.2 for error in result.errors)
    assert len(result.checked) == 4


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "bias"])
def test_a_missing_tensor_is_found(broken, suffix):
    assert broken(lambda tensors: tensors.pop(f"{LAYER}.{suffix}")) == [f"transformer: lacks {LAYER}.{suffix}"]


def test_a_missing_tensor_outside_the_blocks_is_found(broken):
    assert broken(lambda tensors: tensors.pop("proj_out.weight")) == ["transformer: lacks proj_out.weight"]


@pytest.mark.parametrize(
    ("suffix", "before", "after"), [("scales", [2, 128], [1, 128]), ("qweight", [16, 128], [15, 128])]
)
def test_a_wrong_shape_is_found(broken, suffix, before, after):
    def change(tensors):
        tensors[f"{LAYER}.{suffix}"] = tensors[f"{LAYER}.{suffix}"][:-1]

    assert broken(change) == [f"{LAYER}.{suffix}: has shape {after}, not {before}"]


@pytest.mark.parametrize(
    ("suffix", "dtype", "spelled"),
    [("scales", torch.bfloat16, "BF16, not torch.float16"), ("qzeros", torch.int64, "I64, not torch.int32")],
)
def test_a_wrong_dtype_is_found(broken, suffix, dtype, spelled):
    def change(tensors):
        tensors[f"{LAYER}.{suffix}"] = tensors[f"{LAYER}.{suffix}"].to(dtype)

    assert broken(change) == [f"{LAYER}.{suffix}: is {spelled}"]


def test_a_16_bit_twin_beside_a_packed_weight_is_found(broken):
    problems = broken(lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(128, 128)}))
    assert problems == [f"{LAYER}.weight: a 16-bit weight beside the packed one"]


def test_a_packed_layer_that_the_metadata_does_not_list_is_found(broken):
    def change(tensors):
        tensors["proj_out.qweight"] = torch.zeros(16, 16, dtype=torch.int32)

    assert broken(change) == ["proj_out.qweight: packed, but quantization_config does not list its layer"]


def test_a_tensor_of_no_module_is_found(broken):
    problems = broken(lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert problems == ["extra: is no tensor of FluxTransformer2DModel"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_scale_that_is_no_scale_is_found(broken, value):
    def change(tensors):
        tensors[f"{LAYER}.scales"][1, 5] = value

    assert broken(change) == [f"{LAYER}: scales: hold zero, NaN or infinity"]


def test_other_zero_points_than_a_symmetric_schemes_are_found(broken):
    def change(tensors):
        tensors[f"{LAYER}.qzeros"][0, 0] = 0x77777776

    assert broken(change) == [f"{LAYER}: qzeros: are not those of a symmetric scheme"]


def test_swapped_values_of_two_layers_are_found(broken):
    def change(tensors):
        for suffix in ("qweight", "scales"):
            one, other = f"{LAYER}.{suffix}", f"{OTHER}.{suffix}"
            tensors[one], tensors[other] = tensors[other], tensors[one]

    first, second = broken(change, source=True)
    assert first.startswith(f"{LAYER}: a weight is ")
    assert second.startswith(f"{OTHER}: a weight is ")


def test_one_code_off_by_three_is_found(broken):
    def change(tensors):
        qweight = tensors[f"{LAYER}.qweight"]
        code = int(qweight[3, 7]) & 0xF
        qweight[3, 7] += 3 if code < 13 else -3

    [problem] = broken(change, source=True)
    assert problem.startswith(f"{LAYER}: a weight is ")
    assert problem.endswith("codes away from its source; at most 1 is possible")


def test_scales_that_do_not_belong_to_the_weight_are_found(broken):
    def change(tensors):
        # Codes and scales agree with the source to within a code each, yet the grid is far too coarse for it.
        from quantkit_runtime.format import Scheme, pack

        scheme = Scheme(4, 64, True)
        coarse = tensors[f"{LAYER}.scales"].abs() * 12
        codes = torch.full((128, 128), 8, dtype=torch.uint8)
        tensors.update({f"{LAYER}.{name}": value for name, value in pack(codes, coarse, None, scheme).items()})

    [problem] = broken(change, source=True)
    assert problem.startswith(f"{LAYER}: relative error 1.000 against ")


def test_a_changed_tensor_that_is_not_quantized_is_found(broken):
    def change(tensors):
        tensors["proj_out.weight"][0, 0] += 1

    assert broken(change, source=True) == ["proj_out.weight: differs from the source and is not quantized"]


def test_a_tensor_that_is_equal_but_for_its_dtype_is_found(broken):
    def change(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].float()

    assert broken(change, source=True) == ["proj_out.weight: differs from the source and is not quantized"]


def test_a_changed_component_that_is_not_quantized_is_found(checkpoint, flux_model):
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify(checkpoint, source=flux_model).problems == [
        f"{path}: differs from the source and is not quantized"
    ]


def test_a_missing_file_of_another_component_is_found(checkpoint, flux_model):
    path = checkpoint / "tokenizer" / "vocab.json"
    path.unlink()
    assert verify(checkpoint, source=flux_model).problems == [f"{path}: is missing"]


def test_a_component_without_its_weights_is_found(checkpoint):
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert verify(checkpoint).problems == [f"{checkpoint / 'vae'}: has a config.json but no weights"]


def test_a_tensor_that_the_index_does_not_name_is_refused(checkpoint):
    (checkpoint / WEIGHTS).rename(checkpoint / "transformer" / "a.safetensors")
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out.weight": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="weight_map: does not name"):
        verify(checkpoint)


def test_a_changed_file_is_found_by_the_manifest(rtn_checkpoint, tmp_path):
    shutil.copytree(rtn_checkpoint, tmp_path / "copy")
    changed, added, missing = (tmp_path / "copy" / name for name in ("README.md", "new.txt", "model_index.json"))
    changed.write_text("other")
    added.write_text("new")
    (tmp_path / "copy" / "tokenizer" / "merges.txt").unlink()
    del missing
    assert verify(tmp_path / "copy").problems == [
        f"{changed}: has changed since it was written (sha256 differs from the manifest)",
        f"{added}: is not in the manifest",
        f"{tmp_path / 'copy' / 'tokenizer' / 'merges.txt'}: is missing, the manifest lists it",
    ]


@pytest.mark.parametrize("manifest", ["{}", '{"files": []}', '{"files": {"README.md": "abc"}}', "{"])
def test_a_damaged_manifest_is_refused(checkpoint, manifest):
    (checkpoint / "quantkit.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"quantkit\.json: "):
        verify(checkpoint)


def test_layers_other_than_planned_are_found(rtn_checkpoint):
    from dataclasses import replace

    layers = verify(rtn_checkpoint).layers["transformer"]
    first, second, *rest = layers
    planned = [replace(first, scheme=replace(first.scheme, bits=8)), *rest, replace(second, name="another")]
    assert verify(rtn_checkpoint, planned={"transformer": planned}).problems == [
        "transformer: another: planned, but not packed",
        f"transformer: {first.name}: packed as {first.scheme}, planned as {planned[0].scheme}",
        f"transformer: {second.name}: packed, but not planned",
    ]


def test_a_model_that_is_not_quantized_is_refused(flux_model):
    with pytest.raises(CheckpointError, match="no component has a quantization_config; it is not quantized"):
        verify(flux_model)


def test_metadata_of_an_unknown_method_is_refused(checkpoint):
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config\.quant_method: 'gptq'"):
        verify(checkpoint)


@pytest.mark.parametrize("lost", ["vae/config.json", "text_encoder/config.json"])
def test_a_component_without_its_config_is_found_without_the_source(checkpoint, lost):
    (checkpoint / lost).unlink()
    assert verify(checkpoint).problems == [f"{checkpoint / lost}: is missing"]
