import json
import subprocess
import sys

import pytest

from quantkit.demo import path

MAX_BYTES = 25_000_000


def test_embedded_pipeline_fits_the_wheel():
    total = sum(file.stat().st_size for file in path().rglob("*") if file.is_file())
    assert 15_000_000 < total <= MAX_BYTES


def test_embedded_pipeline_has_every_component():
    index = json.loads((path() / "model_index.json").read_text())
    components = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    assert index["_class_name"] == "FluxPipeline"
    assert len(components) == 7
    assert all((path() / name).is_dir() for name in components)


def test_embedded_weights_are_bfloat16():
    from safetensors import safe_open

    for file in path().rglob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
        assert dtypes == {"BF16"}, file


def test_model_card_states_the_training_command():
    card = (path() / "README.md").read_text()
    assert "python -m quantkit.demo.train" in card
    assert "python -m quantkit.demo.evaluate" in card


def test_asking_for_the_path_imports_nothing_heavy():
    code = (
        "import sys; from quantkit.demo import path; path(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_no_local_path_leaks_into_the_files(name):
    text = (path() / name / "tokenizer_config.json").read_text() + (path() / "model_index.json").read_text()
    assert "/tmp" not in text
    assert "/root" not in text
