"""A tuned run that fails goes on where it stopped, and ends with the bytes of a run that did not fail."""

import os
from pathlib import Path

import pytest

from quantkit.errors import QuantizationError
from quantkit.quantize.hashes import hash_file

TUNED = (
    "scheme.iters=6",
    "scheme.lr=0.1",
    "scheme.batch_size=2",
    "layers.overrides=[{match: '*.to_v', bits: 2, sym: false}]",
)
BLOCKS = [f"{kind}.{index}" for kind in ("transformer_blocks", "single_transformer_blocks") for index in range(2)]
KILLER = Path(__file__).parent / "killer"


class Witness:
    """Runs a tuned quantization and sees what it reports; ``how`` makes it fail (``killer/sitecustomize.py``)."""

    def __init__(self, run, monkeypatch, output, *overrides, how=None, **options):
        self.steps, self.notices, self.error = [], [], ""
        options |= {"on_progress": self.steps.append, "on_notice": self.notices.append}
        if how is None:
            self.result = run(output, *TUNED, *overrides, **options)
            return
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(KILLER), os.environ.get("PYTHONPATH")))))
            patch.setenv("QUANTKIT_TEST_KILL", how)
            with pytest.raises(QuantizationError) as error:
                run(output, *TUNED, *overrides, **options)
        self.error = str(error.value)

    @property
    def tuned(self):
        return [step.detail for step in self.steps if step.stage == "tune" and step.result]


@pytest.fixture(scope="module")
def uninterrupted(quantize_tiny, tmp_path_factory):
    return quantize_tiny(tmp_path_factory.mktemp("checkpoints") / "tuned", *TUNED)


@pytest.fixture
def quantize(quantize_tiny, monkeypatch, tmp_path):
    return lambda *overrides, **options: Witness(
        quantize_tiny, monkeypatch, tmp_path / "out", *overrides, **options
    )


def weight_hashes(folder):
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_a_run_that_is_killed_twice_ends_with_the_bytes_of_one_that_is_not(
    quantize, uninterrupted, tmp_path, shows
):
    folder = tmp_path / ".out.resume"
    first = quantize(how="0:after:self")
    assert "its process ended with code -9, perhaps out of memory on cpu; lower scheme.nsamples" in first.error
    assert len(weight_hashes(folder)) == 1
    second = quantize(how="2:before:self")
    assert second.notices == [
        "going on after 1 tuned block of an earlier run",
        f"2 tuned blocks are kept in {folder}; the same command goes on from there",
    ]
    assert second.tuned == BLOCKS[1:2]
    assert len(weight_hashes(folder)) == 2
    assert not (tmp_path / "out").exists()
    third = quantize()
    assert third.notices == ["going on after 2 tuned blocks of an earlier run"]
    assert third.tuned == BLOCKS[2:]
    assert weight_hashes(tmp_path / "out") == weight_hashes(uninterrupted.output)
    assert third.result.tuned.losses == uninterrupted.tuned.losses
    assert third.result.tuned.resumed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shows("flux", "resume")


def test_a_changed_recipe_starts_over_and_a_full_disk_is_named(quantize, tmp_path):
    folder = tmp_path / ".out.resume"
    quantize(how="0:after:self")
    kept = weight_hashes(folder)
    changed = quantize("scheme.lr=0.2", how="disk")
    assert changed.notices == [
        f"starting over: scheme.lr changed from 0.1 to 0.2; the earlier run's blocks are kept in {folder}"
    ]
    assert changed.error.startswith(f"auto-round failed: {folder}")
    assert changed.error.endswith(".safetensors: No space left on device")
    assert weight_hashes(folder) == kept


def test_running_out_of_device_memory_names_what_to_lower_and_leaves_nothing(quantize, tmp_path):
    assert quantize(how="memory").error == (
        "auto-round failed: out of memory on cpu; lower scheme.nsamples or calibration.num_inference_steps or "
        "calibration.height or calibration.width or calibration.max_sequence_length"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_loss_is_the_mean_squared_error_whatever_the_batch(quantize, uninterrupted):
    single = quantize("scheme.batch_size=1").result.tuned.losses
    for one, other in zip(single, uninterrupted.tuned.losses, strict=True):
        assert one.before / 2 < other.before < one.before * 2


def test_the_estimate_of_cached_inputs_is_what_autoround_caches(uninterrupted, quantize_tiny):
    from quantkit.families.flux import FLUX
    from quantkit.quantize.memory import estimate_memory
    from quantkit.recipe import load_recipe

    recipe = load_recipe(quantize_tiny.recipe, TUNED).recipe
    estimate = estimate_memory(uninterrupted.plan, FLUX, recipe)
    assert estimate.cached_nbytes == pytest.approx(uninterrupted.tuned.cached_nbytes, rel=0.1)
