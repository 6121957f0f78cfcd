"""Traces, where the environment names a collector: FastAPI's spans of requests, and what happened inside them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.context import Context

from quantkit_runtime.errors import MissingDependencyError

_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@contextmanager
def exporting() -> Iterator[None]:
    """Send the traces of this process to the collector of the environment, if it names one.

    Raises:
        MissingDependencyError: It does, and the exporter is not installed.
    """
    variable = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if variable is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependencyError(
            f"{variable} is set, but traces need more ({error}): pip install 'quantkit-runtime[otel]', or unset it"
        ) from error
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "quantkit-server")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()  # sends what is left


def current() -> Context:
    """Return where in a trace this task is."""
    return context.get_current()


def record(name: str, parent: Context, began: float, ended: float, **attributes: str | int) -> None:
    """Record a span that is over.

    Args:
        name: Of the span.
        parent: From `current`.
        began: By ``time.monotonic``.
        ended: By ``time.monotonic``.
        attributes: Of the span; never what a caller wrote.
    """
    wall = time.time() - time.monotonic()
    span = trace.get_tracer("quantkit_runtime.server").start_span(
        name, parent, start_time=int((began + wall) * 1e9), attributes=attributes
    )
    span.end(int((ended + wall) * 1e9))
