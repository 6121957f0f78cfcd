"""``quantkit doctor``: its tables, its JSON, its exit code."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit_runtime import selftest
from quantkit_runtime.selftest import Check


@pytest.fixture
def checks(monkeypatch):
    """Stand in for the self-test: ``checks.extend(...)``."""
    made = []
    monkeypatch.setattr(selftest, "run_checks", lambda _devices: iter(made))
    return made


def check(outcome, error=2e-3, reason=""):
    return Check("cpu", "linear", "16bit", "cpu", "W4 g128 sym gptq", outcome, error, 8e-3, reason)


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_machine_without_fault_is_shown_whole():
    result = run()
    assert result.exit_code == 0
    for part in ("Devices", "Packages", "Backends", "Self-test", "torch", "why not the others", "PASS "):
        assert part in result.stdout
    assert "it computes in 16 bit, not in fp8" in result.stdout


def test_the_json_says_the_same_and_nothing_else():
    result = run("--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert data["devices"][-1]["name"] == "cpu"
    assert {"quantkit", "python", "torch built for"} <= data["versions"].keys()
    assert {choice["op"] for choice in data["backends"]} == {"linear", "experts"}
    assert {one["outcome"] for one in data["self_test"]} <= {"PASS", "refused", "not run"}


def test_a_failed_check_is_shown_with_its_reason_and_ends_with_1(checks):
    checks.extend([check("PASS"), check("FAIL", 0.7, "the error is too large")])
    result = run()
    assert result.exit_code == 1
    assert "the error is too large" in result.stdout
    assert "FAIL 1 passed, 1 failed" in result.stdout
    assert json.loads(run("--json").stdout)["passed"] is False


def test_checks_that_did_not_run_are_counted_and_refused_ones_left_out(checks):
    checks.extend([check("PASS"), check("not run", None, "the time was up"), check("refused", None, "no such op")])
    result = run()
    assert result.exit_code == 0
    assert "1 passed, 0 failed, 1 not run" in result.stdout
    assert "no such op" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tune"], "no device here runs the Triton kernels"), (["--tune", "--json"], "prints no JSON")],
)
def test_tune_is_refused_where_it_has_nothing_to_measure_or_print(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "quantkit.cli.main", "doctor", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
