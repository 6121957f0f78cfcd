"""Sound checkpoints, and copies of them to break."""

import pytest
from breakable import Breakable, write_language_model


@pytest.fixture(scope="session")
def sound(quantize_tiny, tmp_path_factory):
    """Folders of sound checkpoints by name; tests must not change them."""
    import tiny

    folder = tmp_path_factory.mktemp("sound")
    wide = tiny.build_flux(folder / "wide-model", heads=8)  # wide enough for tensor parallelism over 8 devices
    return {
        "flux": quantize_tiny(folder / "flux", "scheme.group_size=32", source=wide).output,
        "flux-g128": quantize_tiny(folder / "flux-g128", "scheme.group_size=128").output,
        "llama": write_language_model(folder / "llama", "llama", "model.layers", "quantization_config"),
        "omni": write_language_model(
            folder / "omni",
            "qwen3_omni_moe",
            "thinker.model.layers",
            "thinker_config.text_config.quantization_config",
            blocks="thinker.model.layers,thinker.model.language_model.layers",
        ),
    }


@pytest.fixture
def breakable(sound, tmp_path):
    """Return a copy of a sound checkpoint that may be changed: ``breakable("flux")``."""
    return lambda name: Breakable(sound[name], tmp_path / name)
