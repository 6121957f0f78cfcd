"""Sizes as people write them, and rules that a single key cannot state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.recipe.schema import Calibration, Override, Threshold, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1000", 1000),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5KiB", 1536),
        (" 512MiB ", 2**29),
        ("2GIB", 2**31),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1GB", "0", "0.0MB", "1e9", "5 G B", "\u0665GB", "5GB\n5"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="write for example 5GB"):
        parse_size(text)


@given(st.integers(1, 10**6), st.sampled_from(["KB", "MiB", "GB", "kib"]))
def test_a_size_with_a_unit_is_so_many_units(count, unit):
    assert parse_size(f"{count}{unit}") == count * parse_size(f"1{unit}")


@pytest.mark.parametrize("given_keys", [{}, {"keep": True, "bits": 8}, {"keep": False}])
def test_an_override_says_either_keep_or_a_scheme(given_keys):
    with pytest.raises(ValidationError, match="keep: true or at least one of"):
        Override(match="*", **given_keys)


@pytest.mark.parametrize(
    ("bounds", "reason"), [({}, "give min, max or both"), ({"min": 2, "max": 1}, "min is above max")]
)
def test_a_threshold_has_bounds_in_order(bounds, reason):
    with pytest.raises(ValidationError, match=reason):
        Threshold(**{key: float(value) for key, value in bounds.items()})


def test_calibration_has_one_source():
    with pytest.raises(ValidationError, match="not both"):
        Calibration(prompts="a.txt", dataset="coco2014")
