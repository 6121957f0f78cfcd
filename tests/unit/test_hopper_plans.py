"""The model that chooses how the Hopper kernel shares its work, fitted to measured times."""

import json
import random
from pathlib import Path

import pytest

import hopper_plans
from quantkit_runtime.kernels.hopper_launch import STAGES, Model, plans

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "hopper-plans-h200.json"
MODEL = Model(
    {64: 0.4, 128: 0.9, 256: 1.5}, {64: 2.0, 128: 3.0, 256: 5.0}, {64: 0.5, 128: 1.0, 256: 2.0}, 6.0, 1.07
)


def measured(noise=0.0):
    """Rows as they would be measured on a card of which the model is true."""
    chance = random.Random(0)
    return [
        {
            "shape": f"{in_features}x{out_features}",
            "rows": rows,
            **vars(plan),
            "median_us": MODEL.time_us(plan, in_features // 128) * (1 + noise * chance.uniform(-1, 1)),
        }
        for in_features, out_features in hopper_plans.SHAPES
        for rows in hopper_plans.ROWS
        for block in STAGES
        for plan in plans(block, rows, out_features, in_features // 128, 132, 132)
    ]


def test_the_fit_finds_what_made_the_times():
    found = hopper_plans.fitted(measured())
    assert found.unequal == pytest.approx(MODEL.unequal)
    assert found.sharing_us == pytest.approx(MODEL.sharing_us)
    for name in ("tile_us", "part_us", "sum_us"):
        assert getattr(found, name) == pytest.approx(getattr(MODEL, name))


def test_a_model_of_noisy_times_chooses_nearly_the_best_plans_and_another_cards_worse_ones():
    rows = measured(noise=0.05)
    fitted, other = (hopper_plans.regret(rows, model) for model in (hopper_plans.fitted(rows), hopper_plans.MODEL))
    assert sum(fitted) < sum(other)
    assert max(fitted) < 0.12


def test_the_model_in_use_chooses_nearly_the_best_of_the_plans_that_were_measured():
    rows = json.loads(MEASURED.read_text())["rows"]
    regrets = hopper_plans.regret(rows, hopper_plans.MODEL)
    assert sum(regrets) / len(regrets) < 0.01
    assert max(regrets) < 0.1


def test_an_earlier_run_is_fitted_again_without_the_card(tmp_path, capsys):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({"rows": measured()}))
    hopper_plans.main(["--fit", str(path)])
    assert "fitted: regret 0.00% in the mean" in capsys.readouterr().out


def test_without_such_a_card_nothing_is_measured(capsys):
    with pytest.raises(SystemExit):
        hopper_plans.main(["--device", "cpu"])
    assert "Hopper GPUs; this is cpu" in capsys.readouterr().err
