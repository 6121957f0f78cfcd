import numpy as np
import pytest

from quantkit.compare.frames import frame_values, motion_errors, over_frames, sampled, steadiness
from quantkit.compare.pictures import mae, psnr


@pytest.fixture(scope="module")
def video():
    """Eight frames in which a texture moves to the right."""
    texture = np.random.default_rng(0).integers(60, 190, (16, 24, 3), dtype=np.uint8)
    return np.stack([np.roll(texture, shift, axis=1) for shift in range(8)])


def brighter(video, steps):
    """Return the video with a brightness added to every frame."""
    return (video.astype(int) + np.array(steps)[:, None, None, None]).astype(np.uint8)


def test_flicker_shows_in_the_change_between_frames_where_errors_of_single_frames_are_the_same(video):
    constant, flickering = brighter(video, [10] * 8), brighter(video, [10, -10] * 4)
    for candidate in (constant, flickering):
        assert {psnr(*pair) for pair in zip(video, candidate, strict=True)} == {psnr(video[0], constant[0])}
    assert motion_errors(video, constant) == [0] * 7
    assert motion_errors(video, flickering) == [20] * 7


def test_a_flickering_video_is_less_steady_and_a_still_wholly_so(video):
    still = np.repeat(video[:1], 8, axis=0)
    assert steadiness(still) == 1
    assert steadiness(brighter(still, [0, 51] * 4)) == pytest.approx(1 - 51 / 255)
    assert steadiness(video) < 1


def test_drift_is_the_last_quarter_against_the_first(video):
    worse = brighter(video, [0, 2, 3, 3, 4, 4, 6, 8])
    metrics = over_frames(frame_values({"mae": mae}, video, worse))
    assert metrics == {"mae": 30 / 8, "mae_drift": 7 - 1}


def test_the_worst_frame_is_named_for_psnr_and_ssim():
    metrics = over_frames({"psnr": [40, 30, 20, 50], "ssim": [0.9, 0.8, 0.95, 0.7]})
    assert metrics["psnr_min_over_frames"] == 20
    assert metrics["ssim_min_over_frames"] == 0.7
    assert metrics["psnr_drift"] == 10
    assert metrics["ssim_drift"] == pytest.approx(-0.2)


def test_one_frame_alone_has_no_drift():
    assert over_frames({"psnr": [30.0]}) == {"psnr": 30, "psnr_min_over_frames": 30, "psnr_drift": 0}


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 3, 5, 8]), (81, [0, 27, 53, 80])]
)
def test_sampled_frames_are_evenly_spaced_with_both_ends(count, expected):
    assert sampled(count, 4) == expected
