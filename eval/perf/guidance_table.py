"""The table of cfg_parallel.py: every way, and how they compare round by round."""

from __future__ import annotations

import statistics
from typing import Any

from guidance_clock import tenths
from guidance_ways import Settings, Variant


def print_table(runs: dict[str, Any], settings: Settings, ways: list[Variant]) -> None:
    """Print every variant, and how much faster the second is than the first and the fourth than the third."""
    device = runs[ways[0].name]["device"]
    print(f"{settings.model}, {settings.size} x {settings.size}, true CFG, {settings.steps} steps; {device}")
    print(f"{'':28}{'step, ms':>10}{'10 to 90 %':>18}{'exchange':>10}{'weights, GB':>13}{'peak, GB':>10}")
    for name, run in runs.items():
        later = run["times"]["later"]
        spread = f"{later['p10']:.1f} to {later['p90']:.1f}"
        share = run["times"]["exchange"]["median"] / later["median"]
        exchange = "-" if settings.compile else f"{share:.1%}"
        peak = "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.2f}"
        print(
            f"{name:28}{later['median']:10.1f}{spread:>18}{exchange:>10}{run['weight_bytes'] / 1e9:13.3f}{peak:>10}"
        )
    for before, after in ((ways[0], ways[1]), (ways[2], ways[3])):
        low, middle, high = ratios(runs[before.name]["rounds_ms"], runs[after.name]["rounds_ms"])
        one, two, steps = runs[before.name]["times"], runs[after.name]["times"], settings.steps
        whole = (one["first"]["median"] + one["later"]["median"] * (steps - 1)) / (
            two["first"]["median"] + two["later"]["median"] * (steps - 1)
        )
        print(
            f"{after.name} against {before.name}: a step {middle:.2f} times faster ({low:.2f} to {high:.2f}), "
            f"{steps} steps with the first {whole:.2f} times"
        )


def ratios(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Return 10 %, median and 90 % of the ratios of every round of one to the same round of the other."""
    found = [one / two for one, two in zip(before, after, strict=True)]
    return tenths(found)[0], statistics.median(found), tenths(found)[-1]
