import math

import pytest
import torch

from quantkit.compare.tasks.chat import _pieces, compare_predictions, first_difference


def test_two_distributions_are_compared_as_the_textbook_says():
    ours, theirs = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.4, 0.4])
    found = compare_predictions(ours.log()[None], theirs.log()[None] + 7, [2])
    assert found.kl == pytest.approx((0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.25 / 0.4),), rel=1e-5)
    assert found.logprob_change == pytest.approx((math.log(0.4 / 0.25),), rel=1e-5)
    assert found.probability == pytest.approx((0.4,), rel=1e-5)
    assert found.agreement == (False,)


def test_equal_predictions_are_exactly_equal_whatever_their_dtype():
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn((70, 50), generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
        found = compare_predictions(logits, logits.clone(), [index % 50 for index in range(70)])
        assert found.kl == found.logprob_change == (0.0,) * 70
        assert all(found.agreement)


def test_long_answers_are_compared_as_short_ones_are():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn((2, 70, 20), generator=generator)
    answer = [index % 20 for index in range(70)]
    whole = compare_predictions(ours, theirs, answer)
    single = [compare_predictions(ours[[i]], theirs[[i]], [answer[i]]) for i in range(70)]
    for name in ("kl", "logprob_change", "probability", "agreement"):
        assert getattr(whole, name) == pytest.approx([getattr(one, name)[0] for one in single]), name


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1)],
)
def test_the_first_difference_is_the_first_other_missing_or_further_token(reference, candidate, expected):
    assert first_difference(reference, candidate) == expected


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    class Bytes:
        def decode(self, tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    tokens = list("a\u00e4b\U0001f600".encode())
    assert _pieces(Bytes(), tokens) == ("a", "", "\u00e4", "b", "", "", "", "\U0001f600")
    assert "".join(_pieces(Bytes(), tokens[:-1])) == "a\u00e4b\ufffd"
