"""The performance scripts of the accelerator, on shrunken architectures on the CPU."""

import ast
import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[2] / "eval" / "perf"
SCRIPTS = ("flux_step", "wan_step", "qwen_decode")
OWN = {path.stem for path in FOLDER.glob("*.py")}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script as its command line would; return what it wrote."""
    monkeypatch.syspath_prepend(FOLDER)

    def call(name, *arguments):
        output, plot = tmp_path / "result.json", tmp_path / "plot.svg"
        common = ["--tiny", "--device", "cpu", "--row-s", "0.01", "--output", str(output), "--plot", str(plot)]
        importlib.import_module(name).main([*common, *arguments])
        return json.loads(output.read_text()), ElementTree.parse(plot).getroot() if plot.exists() else None

    yield call
    for name in OWN:
        sys.modules.pop(name, None)


def rows_of(result, variant):
    return [row for row in result["rows"] if row["variant"] == variant]


@pytest.mark.parametrize(("name", "tokens"), [("flux_step", 16), ("wan_step", 32)])
def test_a_step_is_timed_in_every_variant_and_a_refusal_stands_in_its_row(run, name, tokens):
    result, plot = run(name, "--modes", "eager")
    (bf16,), (packed,), (fp8,) = (rows_of(result, variant) for variant in ("bf16", "w4a16", "fp8"))
    assert bf16["tokens"] == packed["tokens"] == tokens
    assert packed["ratio"] == packed["median_ms"] / bf16["median_ms"]
    assert packed["note"] is None
    assert "fp8" in fp8["note"]
    assert "median_ms" not in fp8
    errors = [layer["error"] for layer in result["models"]["w4a16"]["layer_errors"]]
    assert errors
    assert all(1e-4 < error < 1e-2 for error in errors)
    texts = " ".join(plot.itertext())
    assert "bf16 eager" in texts
    assert "w4a16 eager" in texts
    assert "fp8 eager" not in texts


def test_packed_experts_are_compared_with_the_fastest_of_transformers_own(run):
    result, plot = run("qwen_decode", "--tokens", "2", "--full")
    experts = [row for row in result["rows"] if row["what"] == "experts"]
    own = [row for row in experts if row["variant"] == "bf16"]
    assert {row["implementation"] for row in own} == {"grouped_mm", "batched_mm", "eager"}
    (packed,) = (row for row in experts if row["variant"] == "w4a16")
    assert packed["speedup"] == min(row["median_ms"] for row in own) / packed["median_ms"]
    assert all(1e-4 < row["error"] < 2e-2 for row in [*own, packed])
    assert packed["memory_ratio"] < 0.6  # the CPU keeps a second copy of the codes, for its operator
    decoder = [row for row in result["rows"] if row["what"] == "decoder"]
    assert {row["variant"] for row in decoder if "tokens_per_s" in row} == {"bf16", "w4a16"}
    assert "w4a16 cpu" in " ".join(plot.itertext())


def test_the_layer_is_held_against_float64_and_a_peer_that_cannot_run_says_why(run, tmp_path):
    result, plot = run("gemm")
    assert [row["variant"] for row in result["rows"]] == ["bf16", "auto", "marlin"] * 2
    assert all(1e-4 < row["error"] < 1e-2 for row in rows_of(result, "auto"))
    assert {row["note"] for row in rows_of(result, "marlin")} == {"--marlin does not name its source"}
    assert plot is None
    source = tmp_path / "marlin_cuda_kernel.cu"
    result, _ = run("gemm", "--variants", "auto,marlin", "--marlin", str(source))
    assert {row["note"] for row in rows_of(result, "marlin")} == {"MarlinError: needs a CUDA device"}
    result, _ = run("gemm", "--variants", "auto")
    assert not rows_of(result, "marlin")


def test_no_row_begins_when_the_time_is_spent_and_the_file_says_so(run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("measuring").Budget, "spent", True)
    result, plot = run("flux_step", "--modes", "eager")
    assert [row["note"] for row in result["rows"]] == ["no time left"] * 3
    assert plot is None


def test_the_scripts_need_nothing_but_torch_the_runtime_and_the_model_libraries():
    allowed = {"torch", "safetensors", "quantkit_runtime", "diffusers", "transformers", *OWN}
    allowed |= sys.stdlib_module_names
    seen, queue = set(), [*SCRIPTS, "cfg_parallel", "full_flux", "hopper_plans"]
    while queue:
        name = queue.pop()
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            roots = {imported.partition(".")[0] for imported in names}
            assert roots <= allowed
            queue += roots & OWN - seen
            seen |= roots & OWN
    assert "measuring" in seen
