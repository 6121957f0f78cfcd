"""The manifest of the documentation: what it starts is what the server understands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

MANIFEST = Path(__file__).parents[3] / "docs" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def documents():
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_arguments_are_the_servers_own(documents, tmp_path, monkeypatch):
    options = pytest.importorskip("quantkit_runtime.server.options")
    # The manifest's machine has an accelerator.
    monkeypatch.setattr("quantkit_runtime.load.available_device", lambda device: device)
    key = tmp_path / "key"
    key.write_text("secret\n")
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = [one.replace("/keys/key", str(key)) for one in container["args"]]
    settings = options.parse(arguments)
    assert (settings.host, settings.port, settings.api_keys) == ("0.0.0.0", 8091, ("secret",))
    assert settings.limits.max_queue == 32
    assert documents["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > settings.drain_s


def test_probes_and_the_metric_are_those_of_the_server(documents):
    pytest.importorskip("fastapi")
    from quantkit_runtime.server.metrics import Metrics
    from quantkit_runtime.server.security import OPEN_PATHS

    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    probes = {container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes <= OPEN_PATHS
    (metric,) = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    metrics = Metrics()
    metrics.queue_depth("model", 1)
    assert f"\n{metric['pods']['metric']['name']}{{" in metrics.expose()[0].decode()
