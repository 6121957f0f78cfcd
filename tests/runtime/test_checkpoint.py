"""Finding and opening the safetensors files of a model folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from quantkit_runtime.checkpoint import WeightFiles, read_json
from quantkit_runtime.errors import CheckpointFormatError

CPU = torch.device("cpu")


def test_a_single_file_is_read(tmp_path):
    save_file({"a": torch.arange(6).view(2, 3)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert files.shapes == {"a": (2, 3)}
    assert torch.equal(dict(files.read(CPU))["a"], torch.arange(6).view(2, 3))


def sharded(folder, weight_map):
    save_file({"a": torch.ones(2)}, folder / "m-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "m-2.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_by_their_index(tmp_path):
    sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    files = WeightFiles(tmp_path)
    assert files.where("b").name == "m-2.safetensors"
    assert {name: tensor.tolist() for name, tensor in files.read(CPU)} == {"a": [1, 1], "b": [0, 0, 0]}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "m-2.safetensors: has no tensor c"),
        ({"a": "m-2.safetensors"}, "m-2.safetensors: has no tensor a"),
        ({"a": "m-9.safetensors"}, "m-9.safetensors: missing, though the index names it"),
        ({}, "weight_map: missing or empty"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, weight_map, message):
    sharded(tmp_path, weight_map)
    with pytest.raises(CheckpointFormatError, match=message):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: truncated or damaged"):
        WeightFiles(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointFormatError, match="no safetensors weights found"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[]", "not a JSON object"), (None, "cannot be read")]
)
def test_damaged_json_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointFormatError, match=rf"config\.json: {message}"):
        read_json(path)
