"""Importing the package must cost next to nothing and pull in nothing heavy."""

import subprocess
import sys

import pytest

import quantkit_runtime

BASE = ["torch", "numpy", "safetensors"]
OPTIONAL = ["diffusers", "transformers", "accelerate", "triton", "fastapi", "auto_round", "quantkit"]


def loaded_after(statement, candidates):
    code = f"{statement}\nimport sys\nprint([name for name in {candidates!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["quantkit_runtime", "quantkit_runtime.config", "quantkit_runtime.errors"])
def test_metadata_modules_import_nothing_heavy(module):
    assert loaded_after(f"import {module}", [*BASE, *OPTIONAL]) == "[]"


def test_layer_and_loader_import_no_optional_library():
    statement = "from quantkit_runtime import W4A16Linear, load_pipeline, load_model"
    assert loaded_after(statement, OPTIONAL) == "[]"


def test_the_public_names_are_pinned():
    assert quantkit_runtime.__all__ == ["W4A16Experts", "W4A16Linear", "__version__", "load_model", "load_pipeline"]
    assert all(hasattr(quantkit_runtime, name) for name in quantkit_runtime.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = quantkit_runtime.nonsense
