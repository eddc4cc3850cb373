"""OpenTelemetry spans: one trace from the trainer's checkpoint to the applied decision.

Off unless the standard ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) is set; spans
leave by OTLP/HTTP from a background thread, so an absent collector slows nothing. The context
travels as W3C ``traceparent``/``tracestate`` fields of the stream entries. A consumer's span takes
the creation context as its parent (one trace per decision is what people look for); redeliveries
are linked to it instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind

__all__ = ["carrier_of", "setup_tracing", "shutdown_tracing", "span", "span_from"]

_FLUSH_MS = 3000
Attributes = Mapping[str, str | int | float | bool]
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def setup_tracing(service: str, instance: str) -> bool:
    """Export spans if the standard variables ask for it; returns whether they do.

    A second call in one process changes nothing: the first service keeps its name.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return False
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return True
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    resource = Resource.create({"service.name": name, "service.instance.id": instance})
    # The exporter would complain at every retry; what is lost is said once a batch, as an error.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def shutdown_tracing() -> None:
    """Send what is left, for at most three seconds."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(_FLUSH_MS)
        provider.shutdown()


@contextmanager
def span(
    name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None
) -> Iterator[Span]:
    """A span under the current one; an exception marks it as failed and goes on."""
    tracer = trace.get_tracer("elesh")
    with tracer.start_as_current_span(
        name, kind=kind, attributes=dict(attributes or {})
    ) as current:
        yield current


@contextmanager
def span_from(
    carrier: Mapping[str, str],
    name: str,
    *,
    kind: SpanKind = SpanKind.CONSUMER,
    attributes: Attributes | None = None,
    redelivered: bool = False,
) -> Iterator[Span]:
    """A span that continues the trace in ``carrier``; a redelivery also links to its creation."""
    parent = propagate.extract(dict(carrier))
    links = []
    if redelivered:
        links.append(Link(trace.get_current_span(parent).get_span_context(), {"redelivery": True}))
    tracer = trace.get_tracer("elesh")
    with tracer.start_as_current_span(
        name, context=parent, kind=kind, attributes=dict(attributes or {}), links=links
    ) as current:
        yield current


def carrier_of() -> dict[str, str]:
    """The current context as message fields; empty where nothing is traced."""
    fields: dict[str, str] = {}
    propagate.inject(fields)
    return fields
