"""Prometheus metrics of the server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from quantkit_runtime.server.protocol import Failed, Finished, Usage

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_STEP_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        label = ["model"]
        self._queue_depth = Gauge("quantkit_queue_depth", "Requests that wait", label, registry=registry)
        self._queue_wait = Histogram(
            "quantkit_queue_wait_seconds",
            "From submission to the engine",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self._step = Histogram(
            "quantkit_step_seconds", "One denoising step", label, buckets=_STEP_SECONDS, registry=registry
        )
        self._generation = Histogram(
            "quantkit_generation_seconds", "In the engine", label, buckets=_SECONDS, registry=registry
        )
        self._requests = Counter(
            "quantkit_requests", "Requests by what became of them", ["model", "outcome"], registry=registry
        )
        self._batch = Histogram(
            "quantkit_batch_items", "Items that ran together", label, buckets=(1, 2, 4, 8, 16), registry=registry
        )
        self._peak = Gauge("quantkit_peak_memory_bytes", "Of the last request", label, registry=registry)
        self._tokens = Counter("quantkit_tokens", "Tokens of chats", ["model", "direction"], registry=registry)
        self._lost = Counter("quantkit_engine_losses", "Crashes and hangs of engines", label, registry=registry)
        self._ready = Gauge("quantkit_engine_ready", "1 while the engine answers", label, registry=registry)

    def queue_depth(self, model: str, depth: int) -> None:
        """Set how many requests wait."""
        self._queue_depth.labels(model).set(depth)

    def waited(self, model: str, seconds: float) -> None:
        """Count the wait of one request."""
        self._queue_wait.labels(model).observe(seconds)

    def step(self, model: str, seconds: float) -> None:
        """Count one step."""
        self._step.labels(model).observe(seconds)

    def batch(self, model: str, items: int) -> None:
        """Count one run of the engine."""
        self._batch.labels(model).observe(items)

    def ended(self, model: str, event: Finished | Failed) -> None:
        """Count the end of one request."""
        outcome = "ok" if isinstance(event, Finished) else event.kind
        self._requests.labels(model, outcome).inc()
        if isinstance(event, Finished):
            self._generation.labels(model).observe(event.seconds)
            self._peak.labels(model).set(event.peak_memory_bytes)

    def rejected(self, model: str) -> None:
        """Count a request that found the queue full."""
        self._requests.labels(model, "queue_full").inc()

    def tokens(self, model: str, usage: Usage) -> None:
        """Count the tokens of one answer."""
        self._tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model, "completion").inc(usage.completion_tokens)

    def engine_lost(self, model: str) -> None:
        """Count a crash or a hang."""
        self._lost.labels(model).inc()

    def engine_ready(self, model: str, ready: bool) -> None:
        """Set whether an engine answers."""
        self._ready.labels(model).set(ready)

    def expose(self) -> tuple[bytes, str]:
        """Return the text that Prometheus scrapes, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
