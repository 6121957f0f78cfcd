import pytest

from quantkit.errors import RecipeError
from quantkit.gate.bootstrap import Interval
from quantkit.gate.thresholds import check_names, describe, place
from quantkit.recipe.schema import Threshold


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.10, 0.20, "PASS"),
        (0.12, 0.18, "PASS"),
        (0.09, 0.15, "INCONCLUSIVE"),
        (0.15, 0.21, "INCONCLUSIVE"),
        (0.05, 0.30, "INCONCLUSIVE"),
        (0.01, 0.09, "FAIL"),
        (0.21, 0.50, "FAIL"),
    ],
)
def test_an_interval_is_placed_against_both_bounds(low, high, outcome):
    assert place(Interval((low + high) / 2, low, high), Threshold(min=0.1, max=0.2)) == outcome


def test_a_single_bound_leaves_the_other_side_open():
    assert place(Interval(50, 40, 60), Threshold(min=20)) == "PASS"
    assert place(Interval(50, 40, 60), Threshold(max=20)) == "FAIL"


def test_every_unknown_metric_is_named_with_the_closest_known_one():
    with pytest.raises(RecipeError) as caught:
        check_names(["psnr", "pnsr", "zzz"], ["psnr", "ssim"], "r.yaml: compare.thresholds")
    assert caught.value.problems == (
        "r.yaml: compare.thresholds: pnsr: unknown metric (did you mean 'psnr'?)",
        "r.yaml: compare.thresholds: zzz: unknown metric (known metrics: psnr, ssim)",
    )


@pytest.mark.parametrize(
    ("threshold", "text"),
    [(Threshold(min=20), "\u2265 20"), (Threshold(max=0.05), "\u2264 0.05"), (Threshold(min=1, max=2), "1 to 2")],
)
def test_bounds_are_described(threshold, text):
    assert describe(threshold) == text
