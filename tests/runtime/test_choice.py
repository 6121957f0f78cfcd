"""What is chosen by name for packed layers: refused where there are none, and given to the model that has some."""

import json
import subprocess
import sys

import pytest

from quantkit_runtime import load_model, load_pipeline
from quantkit_runtime.choice import check_choice, is_packed
from quantkit_runtime.errors import BackendUnavailableError, CheckpointFormatError
from quantkit_runtime.server.options import parse

QUANTIZATION = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}


def write(folder, **files):
    """Write JSON files whose names are given without their suffix, ``__`` for a folder."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def plain(tmp_path):
    """A pipeline whose denoiser is not quantized; another folder in it is none of its components."""
    index = {"_class_name": "P", "transformer": ["diffusers", "T"], "scheduler": ["diffusers", "S"]}
    return write(
        tmp_path / "plain", model_index=index, transformer__config={}, scheduler__scheduler_config={},
        left_over__config={"quantization_config": QUANTIZATION},
    )  # fmt: skip


@pytest.fixture
def packed(tmp_path):
    """A single model that is quantized."""
    return write(tmp_path / "packed", config={"architectures": ["M"], "quantization_config": QUANTIZATION})


def test_a_model_is_packed_where_a_configuration_of_its_own_says_so(plain, packed):
    assert not is_packed(plain)
    assert not is_packed(plain / "transformer")
    assert is_packed(packed)
    write(plain, transformer__config={"quantization_config": QUANTIZATION})
    assert is_packed(plain)


def test_a_foreign_quantization_is_refused_by_the_file_that_says_so(plain):
    write(plain, transformer__config={"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(CheckpointFormatError, match=r"transformer/config.json: .*'bitsandbytes' is not supported"):
        is_packed(plain)


@pytest.mark.parametrize("chosen", [{"compute": "fp8"}, {"backend": "reference"}])
def test_a_choice_without_a_packed_layer_is_refused_and_goes_with_any_that_has_some(plain, packed, chosen):
    [(option, name)] = chosen.items()
    choice = {"compute": "auto", "backend": "auto", **chosen}
    with pytest.raises(BackendUnavailableError) as caught:
        check_choice(plain, **choice)
    message = f"{option} '{name}': only for packed layers, and {plain} is not quantized; leave it out"
    assert str(caught.value) == message
    with pytest.raises(BackendUnavailableError, match=f"and {plain} and {plain} are not quantized"):
        check_choice(plain, plain, **choice)
    check_choice(plain, packed, **choice)
    check_choice(packed, **choice)


def test_what_layers_that_are_not_packed_do_anyway_is_no_choice(plain):
    check_choice(plain, compute="16bit", backend="auto")
    check_choice(plain, compute="auto", backend="auto")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"compute": "int8"}, "compute 'int8' does not exist"),
        ({"backend": "marlin"}, "backend 'marlin' does not exist"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_whatever_the_model(plain, packed, chosen, words):
    for folder in (plain, packed):
        with pytest.raises(BackendUnavailableError, match=words):
            check_choice(folder, **{"compute": "auto", "backend": "auto", **chosen})


@pytest.mark.parametrize("chosen", [{"compute": "fp8"}, {"backend": "reference"}])
def test_loading_refuses_a_choice_that_would_change_nothing(plain, chosen):
    with pytest.raises(BackendUnavailableError, match="plain is not quantized"):
        load_pipeline(plain, **chosen)
    write(plain, transformer__config={"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(BackendUnavailableError, match="plain/transformer is not quantized"):
        load_model(plain / "transformer", **chosen)


@pytest.mark.parametrize("chosen", [("--compute", "fp8"), ("--backend", "reference")])
def test_the_server_refuses_a_choice_that_would_change_nothing(plain, chosen):
    with pytest.raises(BackendUnavailableError, match="plain is not quantized"):
        parse([str(plain), "--device", "cpu", *chosen])


def test_of_two_served_models_the_packed_one_gets_the_choice(plain, packed):
    for first, second in ((plain, packed), (packed, plain)):
        settings = parse([str(first), "--reference", str(second), "--device", "cpu", "--backend", "reference"])
        assert {name: spec.backend for name, spec in settings.models.items()} == {
            str(plain): "auto",
            str(packed): "reference",
        }


def test_looking_at_a_model_imports_no_torch(packed):
    code = (
        "import sys; from pathlib import Path; from quantkit_runtime.choice import is_packed; "
        "assert is_packed(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, packed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
