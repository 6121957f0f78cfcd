import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.gate.bootstrap import bootstrap_mean
from quantkit.gate.verdict import judge, more_prompts, prompt_means
from quantkit.recipe.schema import Threshold

ORDER = {"PASS": 0, "INCONCLUSIVE": 1, "FAIL": 2}
numbers = st.floats(-100, 100, allow_nan=False)
grids = st.integers(1, 3).flatmap(
    lambda seeds: st.lists(st.lists(numbers, min_size=seeds, max_size=seeds), min_size=1, max_size=8)
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abcd"), grids, min_size=1), numbers)
def test_the_whole_is_as_bad_as_its_worst_row(values, bound):
    verdict = judge(values, {name: Threshold(max=bound) for name in values})
    assert ORDER[verdict.outcome] == max(ORDER[row.outcome] for row in verdict.rows)


@settings(deadline=None, max_examples=60)
@given(grids, numbers, st.floats(0, 50))
def test_loosening_a_threshold_never_makes_a_verdict_worse(values, bound, slack):
    tight = judge({"m": values}, {"m": Threshold(max=bound)})
    loose = judge({"m": values}, {"m": Threshold(max=bound + slack)})
    assert ORDER[loose.outcome] <= ORDER[tight.outcome]


@settings(deadline=None, max_examples=60)
@given(grids, numbers)
def test_a_lower_and_an_upper_bound_mirror_each_other(values, bound):
    upper = judge({"m": values}, {"m": Threshold(max=bound)}).rows[0]
    negated = [[-value for value in row] for row in values]
    interval = bootstrap_mean(prompt_means(negated))
    # Quantiles of the mirrored sample differ by the resampling alone, so only clear cases must agree.
    margin = 0.2 * (interval.high - interval.low)
    if min(abs(-bound - interval.low), abs(-bound - interval.high)) > margin:
        assert judge({"m": negated}, {"m": Threshold(min=-bound)}).rows[0].outcome == upper.outcome


def test_seeds_of_one_prompt_count_as_one_observation():
    spread_over_seeds = judge({"m": [[0.0, 10.0]] * 5}, {"m": Threshold(max=5)})
    assert (spread_over_seeds.rows[0].low, spread_over_seeds.rows[0].high) == (5, 5)
    assert spread_over_seeds.outcome == "PASS"


def test_a_single_prompt_is_judged_by_its_value_and_says_so():
    row = judge({"m": [[3.0, 4.0]]}, {"m": Threshold(max=4)}).rows[0]
    assert (row.outcome, row.value, row.low, row.high) == ("PASS", 3.5, 3.5, 3.5)
    assert "single prompt: no interval" in row.reason


def test_few_prompts_are_called_rough_and_many_are_not():
    few = judge({"m": [[0.1], [0.2], [0.3]]}, {"m": Threshold(max=1)})
    many = judge({"m": [[0.1], [0.2], [0.3]] * 4}, {"m": Threshold(max=1)})
    assert "only 3 prompts" in few.rows[0].reason
    assert "only" not in many.rows[0].reason


def test_an_undecided_row_says_how_many_prompts_would_decide():
    values = [[value] for value in np.random.default_rng(0).normal(1.0, 1.0, 12)]
    row = judge({"m": values}, {"m": Threshold(max=1.2)}).rows[0]
    assert row.outcome == "INCONCLUSIVE"
    assert "more prompts would probably decide" in row.reason


def test_the_estimate_of_more_prompts_mostly_decides():
    generator = np.random.default_rng(1)
    population = generator.normal(1.0, 1.0, 5000)
    threshold = Threshold(max=1.25)
    first = bootstrap_mean(population[:15])
    more = more_prompts(first, threshold, 15)
    assert more is not None
    decided = 0
    for _ in range(20):
        sample = generator.choice(population, 15 + 2 * more)
        decided += judge({"m": [[value] for value in sample]}, {"m": threshold}).outcome != "INCONCLUSIVE"
    assert decided >= 12


def test_a_mean_on_the_bound_is_not_promised_a_decision():
    values = [[1.0], [2.0], [3.0]] * 4
    row = judge({"m": values}, {"m": Threshold(max=2)}).rows[0]
    assert row.outcome == "INCONCLUSIVE"
    assert "unlikely to decide" in row.reason


def test_what_could_not_be_measured_is_inconclusive_and_never_a_number():
    verdict = judge({}, {"lpips": Threshold(max=0.1)}, unavailable={"lpips": "no weights"})
    assert verdict.outcome == "INCONCLUSIVE"
    assert verdict.rows[0].value is None
    assert "no weights" in verdict.reason


def test_a_failure_fails_every_row_whatever_its_values():
    verdict = judge({"m": [[0.0]]}, {"m": Threshold(max=1)}, failures=["latents are not finite"])
    assert verdict.outcome == "FAIL"
    assert verdict.reason == "latents are not finite"
    assert [row.outcome for row in verdict.rows] == ["FAIL"]
    assert verdict.rows[0].value is None


def test_a_failed_verdict_names_the_missed_metric_with_its_value():
    verdict = judge({"psnr": [[12.0]] * 9}, {"psnr": Threshold(min=20)})
    assert verdict.reason == "1 of 1 threshold missed: psnr 12 (wanted \u2265 20)"


def test_a_threshold_without_a_value_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="no value for the metric m"):
        judge({}, {"m": Threshold(max=1)})
    with pytest.raises(ValueError, match="no threshold"):
        judge({"m": [[1.0]]}, {})
