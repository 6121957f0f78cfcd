import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.gate.bootstrap import bootstrap_mean

finite = st.floats(-1e6, 1e6, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(finite, min_size=1, max_size=20))
def test_the_interval_holds_the_mean_and_lies_within_the_values(values):
    interval = bootstrap_mean(values, resamples=199)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert interval.low <= interval.mean <= interval.high
    assert min(values) - slack <= interval.low
    assert interval.high <= max(values) + slack


def test_the_interval_agrees_with_scipys_bca():
    from scipy.stats import bootstrap

    values = np.random.default_rng(5).gamma(1.5, size=25)
    theirs = bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_mean(values, resamples=20_000)
    assert ours.low == pytest.approx(theirs.low, rel=0.01)
    assert ours.high == pytest.approx(theirs.high, rel=0.01)


def test_a_skewed_sample_gives_an_interval_that_reaches_further_to_its_long_tail():
    interval = bootstrap_mean(np.random.default_rng(0).lognormal(sigma=1.0, size=30))
    assert interval.high - interval.mean > 1.2 * (interval.mean - interval.low)


def test_nine_of_ten_intervals_hold_the_true_mean():
    draws = np.random.default_rng(3).normal(size=(300, 20))
    intervals = [bootstrap_mean(row, resamples=399) for row in draws]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 0.82 <= covered / len(draws) <= 0.95


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7])
def test_values_without_spread_give_exactly_themselves(values):
    assert bootstrap_mean(values) == (0.1, 0.1, 0.1)


def test_the_same_values_give_the_same_interval():
    assert bootstrap_mean([1, 2, 3, 7]) == bootstrap_mean([1, 2, 3, 7])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_large_samples_are_resampled_in_bounded_batches(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr("quantkit.gate.bootstrap._CHUNK_ELEMENTS", 700)
    in_batches = bootstrap_mean(values, resamples=500)
    assert in_batches == whole
