"""A server in a process of its own, on a free port of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

_RUN = """
import sys, json
from pathlib import Path
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.run import serve
from quantkit_runtime.server.settings import Settings
given = json.loads(sys.argv[1])
models = {name: ModelSpec(path=path, warm_up=False) for name, path in given.pop("models").items()}
serve(Settings(models=models, state_dir=Path(given.pop("state_dir")), log_format="text", **given))
"""


@contextmanager
def served(models, folder, **settings):
    """Serve models by name and folder; yield the URL once all are ready."""
    port = settings.pop("port", None) or _free_port()
    given = {"models": {name: str(path) for name, path in models.items()}, "port": port, **settings}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, json.dumps({**given, "state_dir": str(folder / "state")})],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(url, process, log, timeout_s=120.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready; {log.read_text()}")


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
