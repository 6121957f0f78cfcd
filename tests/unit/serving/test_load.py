"""The load generator, against a server that takes a known time."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "eval" / "perf" / "load.py"
TAKES_S = 0.05


@pytest.fixture(scope="module")
def load():
    spec = importlib.util.spec_from_file_location("load_generator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(TAKES_S)
        self.send_response(503 if body["seed"] == 2 else 200)
        self.send_header("X-Inference-Time-S", str(TAKES_S))
        self.end_headers()
        if "messages" in body:
            self.wfile.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
            self.wfile.write(b'data: {"usage":{"completion_tokens":7}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_closed_loop_keeps_as_many_requests_running_as_there_are_callers(load, url):
    samples = load.run(url, load.Work("image"), 0.5, concurrency=2)
    summary = load.summarize([samples])
    assert summary.failed == 1  # the second
    assert 4 <= summary.requests <= 22
    assert summary.latency_s["p50"] >= TAKES_S
    assert summary.overhead_ms >= 0


def test_an_open_loop_sends_at_its_rate_and_counts_tokens_and_the_first_of_them(load, url):
    samples = load.run(url, load.Work("chat"), 1.0, rate=20)
    summary = load.summarize([samples])
    assert 8 <= summary.requests <= 35
    assert summary.tokens_per_s == pytest.approx(7 * summary.per_s)
    assert summary.first_s["p50"] >= TAKES_S


def test_percentiles_are_those_of_the_ordered_values(load):
    samples = [load.Sample(200, latency / 100, None, None, 0, 1.0) for latency in range(1, 101)]
    assert load.summarize([samples]).latency_s == {"p50": 0.51, "p90": 0.91, "p99": 1.0}
