"""The memory that rounding to nearest takes, whatever the size of the model."""

import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "perf" / "rtn.py"


@pytest.fixture(scope="module")
def perf():
    spec = importlib.util.spec_from_file_location("perf_rtn", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounding_needs_no_more_memory_than_planning_and_one_shard(perf, tmp_path):
    shard_bytes = 150_000_000
    perf.build(tmp_path / "source", 600_000_000, shard_bytes, heads=8)
    arguments = ("quantize", "--recipe", "flux", "--model", str(tmp_path / "source"), "--set", "scheme.iters=0")
    planning = perf.quantkit(tmp_path, *arguments, "--dry-run")
    rounding = perf.quantkit(tmp_path, *arguments, "--output", str(tmp_path / "output"))
    assert (rounding["peak_rss_kib"] - planning["peak_rss_kib"]) * 1024 < shard_bytes


@pytest.mark.slow
@pytest.mark.huge
@pytest.mark.timeout(1800)
def test_12_gigabytes_are_rounded_and_verified_in_less_than_2(perf, tmp_path, capsys):
    try:
        result = perf.measure(tmp_path, gigabytes=12, shard_gigabytes=1, heads=24)
    finally:
        shutil.rmtree(tmp_path)
    with capsys.disabled():
        perf.print_table(result)
    assert result["source"]["bytes"] >= 12e9
    assert result["source"]["files"] > 12
    assert all(run["peak_rss_kib"] * 1024 < 2e9 for run in result["runs"].values())
