"""What HTTP, queue and encoding add to a request whose generation takes a second.

The model sleeps for 10 steps of a tenth of a second and draws one colour with a little noise, so that PNG has
something to do. ``python eval/perf/serve_overhead.py``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np

from quantkit_runtime.server.models.base import BatchModel, OnStep
from quantkit_runtime.server.protocol import Frames, ImageRequest, ModelInfo, ModelSpec

STEPS, STEP_S, REPEATS = 10, 0.1, 11
SIZES = ("64x64", "512x512", "1024x1024")
_READY_S = 60.0


class Sleeper(BatchModel):
    """Takes a second and draws grainy pictures."""

    info = ModelInfo(frozenset({"image"}), frozenset(), {"width": 64, "height": 64}, description="Sleeper")

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def run(self, requests: list[ImageRequest], on_step: OnStep) -> list[Frames]:
        """Sleep, then draw."""
        for step in range(STEPS):
            time.sleep(STEP_S)
            on_step(step + 1, STEPS)
        [request] = requests
        shape = (request.items, request.height, request.width, 3)
        return [Frames(np.random.default_rng(0).integers(100, 108, shape, dtype=np.uint8))]


def load(_spec: ModelSpec) -> Sleeper:
    """Make the model of the engine."""
    return Sleeper()


def serve() -> None:
    """Run the server, in a process of its own."""
    from quantkit_runtime.server.run import serve as run
    from quantkit_runtime.server.settings import Settings

    spec = ModelSpec(path="sleeper", loader="serve_overhead:load")
    run(Settings(models={"sleeper": spec}, port=int(sys.argv[2]), log_format="text"))


def main() -> None:
    """Measure and print."""
    port = 8799
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with (
        subprocess.Popen([sys.executable, __file__, "serve", str(port)], env=environment) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            _wait_ready(client)
            print("| size | format | added ms, least | median | most | share of the request |")
            print("|---|---|---|---|---|---|")
            for size in SIZES:
                for form in ("png", "jpeg"):
                    _measure(client, size, form)
        finally:
            server.terminate()


def _wait_ready(client: httpx2.Client) -> None:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not come up")


def _measure(client: httpx2.Client, size: str, form: str) -> None:
    added, total = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        answer = client.post("/v1/images/generations", json={"prompt": "x", "size": size, "output_format": form})
        total.append(time.perf_counter() - began)
        answer.raise_for_status()
        added.append((total[-1] - float(answer.headers["x-inference-time-s"])) * 1e3)
    share = statistics.median(added) / statistics.median(total) / 10
    least, middle, most = min(added), statistics.median(added), max(added)
    print(f"| {size} | {form} | {least:.1f} | {middle:.1f} | {most:.1f} | {share:.1f} % |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    else:
        main()
