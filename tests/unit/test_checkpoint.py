"""Opening model folders: what they consist of, and that damage of any kind is a CheckpointError."""

import json
import struct

import pytest

from quantkit.checkpoint import open_model, read_header, read_json, read_tensors
from quantkit.errors import CheckpointError


@pytest.fixture
def write(tmp_path):
    def write_file(content, name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write_file


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
ONE = struct.pack("<Q", len(HEADER)) + HEADER + b"12345678"
INDEX = {
    "_class_name": "FluxPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "flag": True,
}


def test_a_pipeline_lists_components_and_the_files_beside_them(write, tmp_path):
    write(INDEX, "model_index.json")
    write(ONE, "vae/diffusion_pytorch_model.safetensors")
    write({"quantization_config": {"bits": 4}}, "vae/config.json")
    write(b"", "README.md")
    write(b"", ".cache/hidden")
    opened = open_model(tmp_path)
    assert list(opened.components) == ["vae"]
    vae = opened.components["vae"]
    assert (vae.library, vae.class_name, vae.quantization) == ("diffusers", "AutoencoderKL", {"bits": 4})
    assert [path.name for path in vae.weight_files] == ["diffusion_pytorch_model.safetensors"]
    assert vae.nbytes == len(ONE) + len('{"quantization_config": {"bits": 4}}')
    assert [path.name for path in opened.other_files] == ["README.md", "model_index.json"]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "model_index.json: is not valid JSON"),
        (b"[" * 100_000, "model_index.json: is not valid JSON"),
        ([], "model_index.json: is no JSON object"),
        ({}, "model_index.json: _class_name: is missing"),
        ({**INDEX, "unet": []}, r"model_index.json: unet: must be \[library, class\]"),
        ({**INDEX, "unet": ["a", 3]}, r"model_index.json: unet: must be \[library, class\]"),
        ({**INDEX, "unet": ["a", "b"]}, "model_index.json: unet: its folder is missing; download the model again"),
        (
            {**INDEX, "tokenizer": ["a", "b"]},
            "model_index.json: tokenizer: its folder is empty; download the model",
        ),
        ({**INDEX, "../vae": ["a", "b"]}, "model_index.json: ../vae: is no folder name"),
        ({**INDEX, "/etc": ["a", "b"]}, "model_index.json: /etc: is no folder name"),
    ],
)
def test_a_damaged_pipeline_is_refused_with_file_key_and_mend(write, tmp_path, index, reason):
    write(ONE, "vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    write(index, "model_index.json")
    with pytest.raises(CheckpointError, match=reason):
        open_model(tmp_path)


OMNI = {"architectures": ["OmniModel"], "model_type": "omni", "dtype": "bfloat16"}


def test_a_single_model_is_one_component_that_holds_all_files(write, tmp_path):
    write(OMNI, "config.json")
    write(ONE, "model.safetensors")
    write(b"speakers", "spk_dict.pt")
    opened = open_model(tmp_path)
    assert opened.class_name == "OmniModel"
    assert list(opened.components) == ["model"]
    model = opened.components["model"]
    assert (model.library, model.class_name, model.folder) == ("transformers", "OmniModel", tmp_path)
    assert list(model.tensors) == ["x"]
    assert opened.other_files == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"{", "config.json: is not valid JSON"),
        ({}, "config.json: architectures: is missing"),
        ({"architectures": []}, "config.json: architectures: is missing"),
        ({"architectures": [3]}, "config.json: architectures: is missing"),
        ({"_class_name": "AutoencoderKL"}, "is one component of a pipeline; give the pipeline's root"),
    ],
)
def test_a_damaged_single_model_is_refused_with_file_key_and_mend(write, tmp_path, config, reason):
    write(config, "config.json")
    with pytest.raises(CheckpointError, match=reason):
        open_model(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither model_index\.json nor config\.json; give the root of"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(tmp_path / "none")


@pytest.mark.parametrize(
    ("read", "name"), [(read_json, "config.json"), (read_header, "model.safetensors"), (read_tensors, "")]
)
def test_what_the_runtime_finds_wrong_with_a_file_is_a_checkpoint_error(write, tmp_path, read, name):
    write(b"{", "config.json")
    write(b"{", "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\.(json|safetensors): is "):
        read(tmp_path / name)
