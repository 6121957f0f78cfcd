"""Load on a running server, in a closed or an open loop.

Closed: so many callers, each with one request at a time. Open: requests arrive at a rate of their own, whether the
server keeps up or not::

    python eval/perf/load.py --url http://127.0.0.1:8091 --kind image --concurrency 4 --seconds 30
    python eval/perf/load.py --url http://127.0.0.1:8091 --kind chat --rate 2.5 --seconds 30

A request is late from the moment it should have been sent: an open loop counts its wait for a free connection, too.
Nothing but Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 300.0
_OPEN_CALLERS = 128


@dataclass
class Sample:
    """One request.

    Attributes:
        status: HTTP status; 0 where the connection broke.
        latency_s: From the moment it should have been sent to the last byte.
        first_s: To the first token of a chat; None of a picture.
        model_s: What the server says that the model took; None of a stream.
        tokens: Written by a chat.
        end_s: When it was answered, from the beginning of the run.
    """

    status: int
    latency_s: float
    first_s: float | None
    model_s: float | None
    tokens: int
    end_s: float


@dataclass
class Summary:
    """One run, seconds and requests per second; percentiles of successful requests."""

    requests: int
    failed: int
    seconds: float
    per_s: float
    tokens_per_s: float
    latency_s: dict[str, float]
    first_s: dict[str, float]
    overhead_ms: float | None


def main() -> None:
    """Run once and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--kind", choices=["image", "chat"], default="image")
    parser.add_argument("--model", help="name; default: the server's first")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--concurrency", type=int, help="closed loop: callers")
    loop.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the run (default 30)")
    parser.add_argument("--size", type=int, default=64, help="width and height of pictures (default 64)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--api-key")
    given = parser.parse_args()
    work = Work(given.kind, given.model, given.size, given.steps, given.tokens, given.api_key)
    samples = run(given.url, work, given.seconds, concurrency=given.concurrency, rate=given.rate)
    print(json.dumps(asdict(summarize([samples])), indent=1))


@dataclass(frozen=True)
class Work:
    """What is asked for; every request has another seed."""

    kind: str
    model: str | None = None
    size: int = 64
    steps: int = 20
    tokens: int = 64
    api_key: str | None = None

    def request(self, number: int) -> tuple[str, bytes]:
        """Return path and body of a request."""
        body: dict[str, Any] = {"seed": number} | ({"model": self.model} if self.model else {})
        if self.kind == "image":
            size = {"size": f"{self.size}x{self.size}", "num_inference_steps": self.steps}
            return "/v1/images/generations", json.dumps(
                body | size | {"prompt": f"a large red circle, {number}"}
            ).encode()
        messages = [{"role": "user", "content": f"Tell me about the number {number}."}]
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": self.tokens}
        return "/v1/chat/completions", json.dumps(body | options | {"messages": messages}).encode()


def run(
    url: str, work: Work, seconds: float, *, concurrency: int | None = None, rate: float | None = None
) -> list[Sample]:
    """Load a server and return every request.

    Args:
        url: Of the server.
        work: What is asked for.
        seconds: No request begins later.
        concurrency: Callers of a closed loop.
        rate: Requests per second of an open loop, at random times (Poisson).
    """
    samples: list[Sample] = []
    due: queue.Queue[tuple[int, float] | None] = queue.Queue()
    begin = time.perf_counter()
    numbers = iter(range(1, 10**9))
    lock = threading.Lock()

    def closed() -> None:
        while (now := time.perf_counter()) - begin < seconds:
            with lock:
                number = next(numbers)
            samples.append(_ask(url, work, number, now, begin))

    def opened() -> None:
        while (one := due.get()) is not None:
            samples.append(_ask(url, work, *one, begin))

    callers = concurrency or _OPEN_CALLERS
    threads = [threading.Thread(target=closed if concurrency else opened, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    if rate is not None:
        at, arrivals = 0.0, random.Random(0)
        while (at := at + arrivals.expovariate(rate)) < seconds:
            time.sleep(max(begin + at - time.perf_counter(), 0))
            due.put((next(numbers), begin + at))
        for _ in threads:
            due.put(None)
    for thread in threads:
        thread.join()
    return samples


def _ask(url: str, work: Work, number: int, due: float, begin: float) -> Sample:
    path, body = work.request(number)
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if work.api_key:
        headers["Authorization"] = f"Bearer {work.api_key}"
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    first, tokens, status, model_s = None, 0, 0, None
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        status = answer.status
        model_s = float(answer.headers["X-Inference-Time-S"]) if "X-Inference-Time-S" in answer.headers else None
        if work.kind == "chat" and status == 200:
            for line in answer:
                if first is None and b'"content":"' in line and b'"content":""' not in line:
                    first = time.perf_counter() - due
                if b'"usage":{' in line:
                    tokens = int(json.loads(line[6:])["usage"]["completion_tokens"])
        else:
            answer.read()
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    now = time.perf_counter()
    return Sample(status, now - due, first, model_s, tokens, now - begin)


def summarize(runs: list[list[Sample]]) -> Summary:
    """Return rates and percentiles over several runs."""
    samples = [one for samples in runs for one in samples]
    good = [one for one in samples if one.status == 200]
    seconds = sum(max((one.end_s for one in samples), default=0.0) for samples in runs)
    overheads = [1e3 * (one.latency_s - one.model_s) for one in good if one.model_s is not None]
    return Summary(
        requests=len(samples),
        failed=len(samples) - len(good),
        seconds=seconds,
        per_s=len(good) / seconds if seconds else 0.0,
        tokens_per_s=sum(one.tokens for one in good) / seconds if seconds else 0.0,
        latency_s=_percentiles([one.latency_s for one in good]),
        first_s=_percentiles([one.first_s for one in good if one.first_s is not None]),
        overhead_ms=statistics.median(overheads) if overheads else None,
    )


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{part}": ordered[min(len(ordered) * part // 100, len(ordered) - 1)] for part in (50, 90, 99)}


if __name__ == "__main__":
    main()
