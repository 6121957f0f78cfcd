"""Reading the files of a model folder: what is in them, and that damage of any kind is one clear error."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit_runtime.checkpoint import WeightFiles, read_header, read_json, read_tensors
from quantkit_runtime.errors import CheckpointFormatError


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="model.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write_file


GOOD = safetensors({"__metadata__": {"a": "b"}, "x": tensor(), "y": tensor("BF16", (3, 0), (8, 8))}, b"12345678")


def test_a_header_gives_name_dtype_shape_and_bytes(write):
    path = write(GOOD)
    x, y = read_header(path).values()
    assert (x.name, x.file, x.dtype, x.shape, x.nbytes) == ("x", path, "F32", (2,), 8)
    assert (y.dtype, y.shape, y.nbytes) == ("BF16", (3, 0), 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        GOOD[:-1],
        GOOD + b"\x00",
        GOOD[:20],
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        safetensors(b"{"),
        safetensors(b"\xff\xfe"),
        safetensors(b"[" * 100_000),
        safetensors([1]),
        safetensors({"x": 3}),
        safetensors({"x": {}}),
        safetensors({"x": {**tensor(), "shape": None}}, b"12345678"),
        safetensors({"x": tensor(shape=("2",))}, b"12345678"),
        safetensors({"x": tensor(shape=(-1, -2))}, b"12345678"),
        safetensors({"x": tensor(shape=(True, 2))}, b"12345678"),
        safetensors({"x": tensor(dtype="F31")}, b"12345678"),
        safetensors({"x": tensor(dtype=["F32"])}, b"12345678"),
        safetensors({"x": tensor(offsets=(0, 8, 8))}, b"12345678"),
        safetensors({"x": tensor(offsets=(0, 1e400))}, b"12345678"),
        safetensors({"x": tensor(offsets=(-8, 0))}, b""),
        safetensors({"x": tensor(), "y": tensor()}, b"12345678"),
        safetensors({"x": tensor(), "y": tensor(offsets=(4, 12))}, b"123456789012"),
        safetensors({"x": tensor(), "y": tensor(offsets=(9, 17))}, b"1" * 17),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(write, content):
    path = write(content)
    with pytest.raises(CheckpointFormatError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "again" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(position=st.integers(0, len(GOOD) - 9), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_changed_byte_of_a_header_is_harmless_or_a_checkpoint_error(write, position, byte):
    path = write(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
    try:
        tensors = read_header(path)
    except CheckpointFormatError:
        return
    assert sum(info.nbytes for info in tensors.values()) == 8


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-4, 16)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    header=st.dictionaries(
        st.sampled_from(["x", "y"]),
        VALUES | st.fixed_dictionaries({"dtype": VALUES, "shape": VALUES, "data_offsets": VALUES}),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_header_of_json_is_read_or_a_checkpoint_error(write, header):
    path = write(safetensors(header, b"12345678"))
    try:
        tensors = read_header(path)
    except CheckpointFormatError:
        return
    assert sum(info.nbytes for info in tensors.values()) == 8


def shards(write, weight_map, **files):
    for name, content in files.items():
        write(content, f"{name}.safetensors")
    return write({"weight_map": weight_map}, "model.safetensors.index.json").parent


ONE = safetensors({"x": tensor()}, b"12345678")
OTHER = safetensors({"y": tensor()}, b"12345678")


def test_shards_are_read_through_their_index(write):
    folder = shards(write, {"x": "a.safetensors", "y": "b.safetensors"}, a=ONE, b=OTHER)
    assert {name: info.file.name for name, info in read_tensors(folder).items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "files", "reason"),
    [
        (None, {}, "weight_map: is missing or empty"),
        ({}, {}, "weight_map: is missing or empty"),
        ([1], {}, "weight_map: is missing or empty"),
        ({"x": 3}, {}, "weight_map: 3 is no file name"),
        ({"x": ["a"], "y": {}}, {}, r"weight_map: \['a'\] is no file name"),
        ({"x": "../a.safetensors"}, {"a": ONE}, r"weight_map: '\.\./a\.safetensors' is no file name"),
        ({"x": "a.safetensors"}, {}, r"a\.safetensors: cannot be read: No such file"),
        ({"x": "a.safetensors", "z": "a.safetensors"}, {"a": ONE}, "lacks the tensor z that"),
        ({"x": "b.safetensors", "y": "a.safetensors"}, {"a": ONE, "b": OTHER}, "lacks the tensor"),
        ({"y": "b.safetensors", "z": "a.safetensors"}, {"a": ONE, "b": OTHER}, "lacks the tensor z"),
        ({"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}, {"a": ONE, "b": OTHER, "c": ONE},
         r"c\.safetensors: x: a\.safetensors holds it too"),
        ({"y": "b.safetensors"}, {"b": safetensors({"y": tensor(), "w": tensor(offsets=(8, 16))}, b"1" * 16)},
         "weight_map: does not name w, which a shard holds"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_its_shards_is_refused(write, weight_map, files, reason):
    folder = shards(write, weight_map, **files)
    with pytest.raises(CheckpointFormatError, match=reason):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "flux.ckpt"])
def test_weights_in_pickle_form_are_refused(write, name):
    folder = write(b"\x80\x02", name).parent
    with pytest.raises(CheckpointFormatError, match=f"{name}: is in pickle form; convert it to safetensors"):
        read_tensors(folder)


def test_a_folder_without_weights_has_no_tensors(tmp_path):
    assert read_tensors(tmp_path) == {}


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_read_with_their_values(tmp_path, sharded):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.zeros(3)}
    if sharded:
        for name, tensor in tensors.items():
            save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert files.where("b").name == ("b.safetensors" if sharded else "model.safetensors")
    found = dict(files.read(torch.device("cpu")))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_model_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointFormatError, match="holds no safetensors weights; save the model with"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("[]", "is no JSON object"),
     (None, "cannot be read: No such file")],
)  # fmt: skip
def test_damaged_json_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointFormatError, match=rf"config\.json: {message}"):
        read_json(path)
