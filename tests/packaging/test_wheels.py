"""The built wheels: what is inside, and that the runtime's works alone in an empty environment."""

import json
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(project, folder):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project],
        check=True,
        capture_output=True,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("toolkit"))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return build(ROOT / "runtime", tmp_path_factory.mktemp("runtime"))


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.parametrize(("wheel", "package"), [("toolkit", "quantkit"), ("runtime", "quantkit_runtime")])
def test_a_wheel_holds_one_package_typed_and_licensed(wheel, package, request):
    path = request.getfixturevalue(wheel)
    names = contents(path)
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {package}
    assert f"{package}/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_every_module_of_the_checkout_is_in_its_wheel(toolkit, runtime):
    for wheel, folder in ((toolkit, ROOT), (runtime, ROOT / "runtime")):
        [package] = {
            name.partition("/")[0] for name in contents(wheel) if not name.partition("/")[0].endswith("-info")
        }
        modules = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")}
        assert modules - contents(wheel) == set()


@pytest.mark.parametrize(
    ("folder", "inside"), [("recipes", "recipes"), ("eval/prompts", "prompts"), ("eval/suites", "suites")]
)
def test_the_toolkits_data_is_inside(toolkit, folder, inside):
    files = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    prefix = f"quantkit/_data/{inside}/"
    assert {name.removeprefix(prefix) for name in contents(toolkit) if name.startswith(prefix)} == files


def test_the_report_template_is_inside(toolkit):
    templates = [
        path for path in (ROOT / "quantkit").rglob("*") if path.suffix in {".j2", ".jinja", ".html", ".css"}
    ]
    assert {str(path.relative_to(ROOT)) for path in templates} <= contents(toolkit)


def test_the_embedded_model_is_inside(toolkit):
    prefix = "quantkit/demo/pipeline/"
    found = {name.removeprefix(prefix) for name in contents(toolkit) if name.startswith(prefix)}
    weights = {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "model_index.json",
        "README.md",
    }
    assert weights - found == set(), "missing in the wheel"


def test_the_published_configurations_are_inside(toolkit):
    folder = ROOT / "quantkit" / "families" / "published"
    files = {str(path.relative_to(ROOT)) for path in folder.rglob("*.json")}
    assert "quantkit/families/published/sizes.json" in files
    assert files <= contents(toolkit)


def test_the_toolkits_metadata(toolkit):
    found = metadata(toolkit)
    assert found["Name"] == "quantkit"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert {"quantize", "eval", "dev", "all"} <= set(found.get_all("Provides-Extra"))
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert any(line.startswith("quantkit-runtime") for line in required)
    assert not [line for line in required if line.startswith(("torch", "diffusers", "transformers", "auto-round"))]


def test_the_runtimes_metadata(runtime):
    found = metadata(runtime)
    assert found["Name"] == "quantkit-runtime"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">")[0] for line in required} == {"torch", "safetensors", "numpy"}


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    yield folder / "bin" / "python"
    shutil.rmtree(folder)  # gigabytes, once torch is in it


def test_the_runtime_alone_passes_its_tests_in_an_empty_environment(runtime, empty_environment, tmp_path):
    python = empty_environment
    tests = ["pytest", "pytest-timeout", "hypothesis"]
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, runtime, *tests], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    installed = {line.partition("==")[0].lower() for line in listed.stdout.splitlines()}
    assert "quantkit-runtime" in installed
    assert installed & {"quantkit", "diffusers", "transformers", "fastapi", "auto-round", "datasets"} == set()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "runtime"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_runtime_with_its_server_extra_alone_serves_a_picture(runtime, empty_environment, tmp_path):
    python = empty_environment
    constraints = ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "-q", "--no-compile"]  # compiling all of transformers takes a minute
    subprocess.run([*install, "-c", constraints, f"{runtime}[server]"], check=True)
    options = ["--port", "0", "--device", "cpu", "--no-warm-up", "--default", "max_sequence_length=48"]
    command = [python, "-m", "quantkit_runtime.server", ROOT / "quantkit/demo/pipeline", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if '"message": "ready"' in line:
                    break
            assert lines, "nothing was logged"
            address = json.loads(lines[-1])["url"]
            body = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}
            request = urllib.request.Request(
                f"{address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                assert len(json.load(answer)["data"]) == 1
        finally:
            server.terminate()
            server.stderr.read()
    assert server.returncode == 0
