"""Fixtures that several folders of tests share."""

import os
import sys
from pathlib import Path

import pytest

# tests/tiny is imported by name; --import-mode=importlib adds no folder to the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

from support_matrix import pytest_addoption, pytest_sessionfinish, shows  # noqa: F401  (pytest finds hooks and fixtures here)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def flux_model(tmp_path_factory):
    """Folder of a tiny random FLUX pipeline, 128 wide; tests must not change it."""
    import tiny

    return tiny.build_flux(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random pipeline, made once: ``tiny_model("wan_t2v")``; tests must not change it."""
    import tiny

    folder = tmp_path_factory.mktemp("families")
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = getattr(tiny, f"build_{name}")(folder / f"tiny-{name}")
        return made[name]

    return get


@pytest.fixture
def golden():
    """Compare text with a file under tests/golden; QUANTKIT_UPDATE_GOLDEN=1 writes it anew."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("QUANTKIT_UPDATE_GOLDEN") == "1":
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def quantize_tiny(flux_model, tmp_path_factory):
    """Quantize the tiny pipeline in this process: ``quantize_tiny(output, *overrides, source=...)``."""
    from quantkit.quantize.run import prepare, quantize
    from quantkit.recipe import load_recipe

    folder = tmp_path_factory.mktemp("recipes")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        "version: 1\n"
        "model: {id: tiny-flux, family: flux}\n"
        "scheme: {group_size: 64, iters: 0, nsamples: 2, batch_size: 1}\n"
        "sampling: {height: 32, width: 32, num_inference_steps: 2, max_sequence_length: 16}\n"
        "calibration: {prompts: prompts.txt}\n",
        encoding="utf-8",
    )

    def run(output, *overrides, source=flux_model, **kwargs):
        return quantize(prepare(load_recipe(recipe, overrides), source), output, **kwargs)

    run.recipe = recipe
    return run


@pytest.fixture(scope="session")
def rtn_checkpoint(quantize_tiny, tmp_path_factory):
    """The tiny pipeline rounded to nearest, 4 bit in groups of 64; tests must not change it."""
    return quantize_tiny(tmp_path_factory.mktemp("checkpoints") / "rtn").output
