import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantkit.compare.kinds import KINDS
from quantkit.compare.lpips import BACKBONE_FILE, Lpips, why_no_lpips
from quantkit.compare.metrics import METRICS, PSNR_CAP_DB
from quantkit.compare.pictures import (
    cosine,
    cosine_distance,
    flip_map,
    mae,
    picture_functions,
    psnr,
    relative_l2,
    rmse,
    ssim,
    too_small,
)
from quantkit.errors import MissingExtraError, RecipeError
from quantkit.gate.thresholds import DEFAULT_THRESHOLDS

vectors = arrays(np.float32, 12, elements=st.floats(-100, 100, width=32))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_equal_images_have_the_best_value_of_every_metric(image):
    functions, _ = picture_functions(None)
    best = {"psnr": PSNR_CAP_DB, "ssim": 1.0, "image_cosine": 1.0}
    assert not flip_map(image, image.copy()).any()
    for name, function in functions.items():
        assert function(image, image.copy()) == best.get(name, 0.0), name


def test_more_noise_is_worse_in_the_direction_that_each_metric_states(image):
    generator = np.random.default_rng(1)
    noise = generator.normal(size=image.shape)
    slight, strong = (np.clip(image + scale * noise, 0, 255).astype(np.uint8) for scale in (4, 40))
    functions, _ = picture_functions(None)
    functions["flip"] = lambda one, two: flip_map(one, two).mean()
    assert functions.keys() >= {"psnr", "ssim", "mae", "rmse", "image_cosine", "image_rel_l2"}
    for name, function in functions.items():
        worse_is_less = METRICS[name].better == "higher"
        assert (function(image, strong) < function(image, slight)) == worse_is_less, name


def test_image_errors_have_their_textbook_values():
    dark, light = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert mae(dark, light) == 51
    assert rmse(dark, light) == 51
    assert psnr(dark, light) == pytest.approx(20 * np.log10(5))
    assert relative_l2(light, dark) == 1
    assert ssim(dark, light) < 0.01


def test_psnr_is_capped_where_a_single_channel_value_differs_in_a_large_image():
    image = np.zeros((512, 512, 3), np.uint8)
    other = image.copy()
    other[0, 0, 0] = 1
    assert psnr(image, other) == PSNR_CAP_DB
    assert mae(image, other) > 0


@settings(deadline=None)
@given(vectors, vectors)
def test_cosine_and_relative_l2_agree_with_their_definitions(reference, candidate):
    wide, other = reference.astype(np.float64), candidate.astype(np.float64)
    norms = np.linalg.norm(wide), np.linalg.norm(other)
    if min(norms) > 1e-3:
        assert cosine(reference, candidate) == pytest.approx(wide @ other / (norms[0] * norms[1]), abs=1e-12)
        assert relative_l2(reference, candidate) == pytest.approx(np.linalg.norm(other - wide) / norms[0])
    assert relative_l2(reference, reference) == 0
    assert cosine(reference, reference) == 1


def test_cosine_keeps_angles_that_a_dot_product_rounds_away():
    reference = np.array([1.0, 0.0])
    assert cosine_distance(reference, np.array([1.0, 1e-9])) == pytest.approx(5e-19)


def test_a_black_reference_has_a_finite_relative_difference():
    black = np.zeros((4, 4, 3), np.uint8)
    assert relative_l2(black, black + 7) == 1
    assert cosine(black, black + 7) == 0


def test_the_flip_map_is_high_where_the_images_differ(image):
    other = image.copy()
    other[:24, :32] = 255 - other[:24, :32]
    error = flip_map(image, other)
    assert error.shape == image.shape[:2]
    assert error[:16, :24].mean() > 10 * error[32:, 44:].mean()
    assert 0 <= error.min() <= error.max() <= 1


def test_small_images_name_the_metrics_they_cannot_have():
    assert too_small(64) == {}
    assert too_small(16).keys() == {"lpips"}
    assert too_small(8).keys() == {"lpips", "ssim"}


def test_missing_libraries_are_named_with_their_extra(monkeypatch):
    monkeypatch.setattr("quantkit.compare.pictures.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"scikit-image is not installed: pip install 'quantkit\[eval\]'"):
        picture_functions(None)
    monkeypatch.setattr(
        "quantkit.compare.pictures.find_spec", lambda name: None if name == "flip_evaluator" else "there"
    )
    _, unavailable = picture_functions(None)
    assert "quantkit[eval]" in unavailable["flip"]


def test_the_built_in_thresholds_name_metrics_that_exist():
    assert DEFAULT_THRESHOLDS.keys() == KINDS.keys()
    for task, thresholds in DEFAULT_THRESHOLDS.items():
        assert thresholds.keys() <= set(KINDS[task].metrics()), task


@pytest.fixture(scope="module")
def alexnet():
    from torchvision.models import alexnet

    torch.manual_seed(0)
    return {name: value for name, value in alexnet().state_dict().items() if name.startswith("features")}


class TestLpips:
    def test_without_weights_it_is_unavailable_with_the_way_to_get_them(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        functions, unavailable = picture_functions(None)
        assert "lpips" not in functions
        assert BACKBONE_FILE in unavailable["lpips"]
        assert "--lpips-backbone" in unavailable["lpips"]

    def test_weights_in_the_cache_make_it_the_distance_that_the_lpips_library_computes(
        self, alexnet, image, tmp_path, monkeypatch
    ):
        import lpips

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        cached = tmp_path / "hub" / "checkpoints" / BACKBONE_FILE
        cached.parent.mkdir(parents=True)
        torch.save(alexnet, cached)
        assert why_no_lpips(None) is None
        ours = Lpips(None)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for layers in (
            theirs.net.slice1,
            theirs.net.slice2,
            theirs.net.slice3,
            theirs.net.slice4,
            theirs.net.slice5,
        ):
            for index, layer in layers.named_children():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.load_state_dict({k: alexnet[f"features.{index}.{k}"] for k in ("weight", "bias")})
        other = np.roll(image, 5, axis=1)
        left, right = (lpips.im2tensor(picture) for picture in (image, other))
        assert ours(image, image) == 0
        assert ours(image, other) == pytest.approx(theirs(left, right).item(), rel=1e-4)
        assert ours(image, other) > 0

    def test_safetensors_are_read_as_well(self, alexnet, image, tmp_path):
        from safetensors.torch import save_file

        save_file(alexnet, tmp_path / "alexnet.safetensors")
        torch.save(alexnet, tmp_path / "alexnet.pth")
        other = 255 - image
        assert Lpips(tmp_path / "alexnet.safetensors")(image, other) == Lpips(tmp_path / "alexnet.pth")(
            image, other
        )

    def test_a_file_that_is_no_alexnet_is_refused(self, alexnet, tmp_path):
        (tmp_path / "broken.pth").write_bytes(b"nothing")
        with pytest.raises(RecipeError, match=r"broken\.pth: cannot be read as AlexNet weights"):
            Lpips(tmp_path / "broken.pth")
        torch.save({"features.0.weight": alexnet["features.0.weight"]}, tmp_path / "part.pth")
        with pytest.raises(RecipeError, match=r"part\.pth: no AlexNet: features\.0\.bias is missing"):
            Lpips(tmp_path / "part.pth")
