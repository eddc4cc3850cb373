"""OpenTelemetry spans: one trace from the trainer's checkpoint to the outcome of its decision.

Promises: nothing here waits for a collector: spans leave from background threads, a queue that is
full drops, and the end of a process waits for at most three seconds. No span is exported whose
parent in the same process is not: a process's part of a trace leaves as a whole when its first span
ends, so that what a killed process leaves behind is missing, never torn (decision 0050).

Spans go by OTLP/HTTP where the standard ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or
``..._TRACES_ENDPOINT``) says, and into the bounded file that ``elesh trace`` reads
(:mod:`.spanfile`). The context travels as W3C ``traceparent``/``tracestate`` fields of the stream
entries; work on a checkpoint has the context that the trainer created as its parent.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from elesh.settings import ObserveSettings, SettingsError

from .logs import get_logger
from .spanfile import SpanFile

Attributes = Mapping[str, str | int | float | bool]
SpanTimes = tuple[str, int, int, int]
"""Name, place of its parent among the spans (-1: none), begin and end in ns since 1970."""
_END_SECONDS = 3.0
_DELAY_MS = 500
"""A batch of spans is exported after so long: a process that is killed later has sent its spans."""
_MAX_TREE = 4096
_LEAST_SECONDS = 0.1
_ends = float("-inf")
"""When the process stops waiting for providers that end (monotonic seconds)."""
_EXPORT_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.metrics._internal.export",
)
_log = get_logger(__name__)


def is_exported(signal: str) -> bool:
    """Whether the standard variables ask for ``signal`` (``TRACES``, ``METRICS``) to leave."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") == "none" or _is_disabled():
        return False
    return any(os.environ.get(name) for name in names)


def _is_disabled() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"


def resource_of(service: str, instance: str) -> Resource:
    """The resource of a process; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override it."""
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    return Resource.create(
        {
            "service.name": name,
            "service.instance.id": instance,
            "service.version": version("elesh"),
        }
    )


def setup_tracing(service: str, instance: str, settings: ObserveSettings) -> bool:
    """Record spans as settings and standard variables ask for; returns whether any are.

    A second call in one process changes nothing: the first service keeps its name, and a provider
    that the training script has set up itself is used as it is.
    """
    try:
        return _set_up(service, instance, settings)
    except Exception as error:  # whatever the SDK makes of a variable that it cannot read
        _log.warning("no traces: OTEL settings cannot be met", reason=f"{error!r}"[:300])
        return False


def _set_up(service: str, instance: str, settings: ObserveSettings) -> bool:
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return True
    exporters = _exporters(settings)
    if not exporters:
        return False
    quiet_exporters()
    # OTEL_TRACES_SAMPLER overrides our setting; the SDK reads it if no sampler is given.
    given = os.environ.get("OTEL_TRACES_SAMPLER")
    provider = TracerProvider(
        sampler=None if given else ParentBasedTraceIdRatio(settings.sample_ratio),
        resource=resource_of(service, instance),
        shutdown_on_exit=False,  # it would wait for half a minute
        id_generator=SystemIds(),
    )
    provider.add_span_processor(WholeTrees([_batched(exporter) for exporter in exporters]))
    trace.set_tracer_provider(provider)
    atexit.register(shutdown_tracing)
    return True


class SystemIds(RandomIdGenerator):
    """Ids from the system: the default takes them from the generator that training seeds."""

    def generate_span_id(self) -> int:
        """64 bits, not all zero."""
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        """128 bits, not all zero."""
        return secrets.randbits(128) or 1


def _exporters(settings: ObserveSettings) -> list[SpanExporter]:
    """The file first: it is quick, and a collector that stalls must not hold it up."""
    exporters: list[SpanExporter] = []
    if settings.trace_file_size and settings.sample_ratio and not _is_disabled():
        try:
            exporters.append(SpanFile(limit=settings.trace_file_size))
        except SettingsError as error:
            _log.warning("traces are not kept", reason=str(error))
    if is_exported("TRACES"):
        exporters.append(OTLPSpanExporter())
    return exporters


def _batched(exporter: SpanExporter) -> BatchSpanProcessor:
    delay = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else _DELAY_MS
    return BatchSpanProcessor(exporter, schedule_delay_millis=delay)


def shutdown_tracing() -> None:
    """Send what is left, for at most three seconds."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        in_time(provider.shutdown)


def in_time(shutdown: Callable[[], object]) -> None:
    """End a provider: the SDK's own timeouts do not hold while an export waits for an answer. All
    providers of a process end within three seconds together."""
    global _ends
    now = time.monotonic()
    if now > _ends + _END_SECONDS:
        _ends = now + _END_SECONDS
    ending = threading.Thread(target=shutdown, name="elesh-last-telemetry", daemon=True)
    ending.start()
    ending.join(max(_LEAST_SECONDS, _ends - now))


def quiet_exporters() -> None:
    """They would complain at every batch and retry, some with a traceback: what is lost is said in
    one line a minute."""
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    for name in _EXPORT_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _OneLine) for each in logger.filters):
            logger.addFilter(_OneLine())


class _OneLine(logging.Filter):
    """Lets one line a minute pass, without its traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._next = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it passes."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 60.0
        if record.exc_info:
            record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]!r}", ()
            record.exc_info = record.exc_text = None
        return True


class WholeTrees(SpanProcessor):
    """Holds a process's part of a trace until its first span has ended, then passes it on."""

    def __init__(self, processors: Sequence[SpanProcessor]) -> None:
        self._processors = processors
        self._lock = threading.Lock()
        self._roots: dict[int, int] = {}
        """The first span of the tree that a live span belongs to, by id."""
        self._trees: dict[int, list[ReadableSpan]] = {}
        """What has ended of each tree whose first span lives."""

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """A span without a live parent in this process begins a tree."""
        own, parent = span.get_span_context(), span.parent
        if own is None:
            return
        with self._lock:
            local = parent is not None and not parent.is_remote
            root = self._roots.get(parent.span_id) if parent is not None and local else None
            if root is None:
                root = own.span_id
                self._trees[root] = []
            self._roots[own.span_id] = root

    def on_end(self, span: ReadableSpan) -> None:
        """Keep the span, or pass its tree on if it was the first; latecomers go at once."""
        own = span.get_span_context()
        if own is None:
            return
        with self._lock:
            root = self._roots.pop(own.span_id, own.span_id)
            tree = self._trees.get(root)
            if tree is None:
                tree = []
            elif root == own.span_id or len(tree) >= _MAX_TREE:
                del self._trees[root]
            else:
                tree.append(span)
                return
        for each in (*tree, span):
            for processor in self._processors:
                processor.on_end(each)

    def shutdown(self) -> None:
        """Pass on what is whole; each processor sends what it has."""
        for processor in self._processors:
            processor.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Have each processor send what it has."""
        return all(processor.force_flush(timeout_millis) for processor in self._processors)


def mark_failed(kind: str, reason: str) -> None:
    """Say that what the current span stands for failed, though no exception leaves it.

    Args:
        kind: stable name of the failure, as ``error.type``.
        reason: for people.
    """
    current = trace.get_current_span()
    current.set_attribute("error.type", kind)
    current.set_status(Status(StatusCode.ERROR, reason))


@contextmanager
def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
    carrier: Mapping[str, str] | None = None,
    redelivered: bool = False,
    answers: Mapping[str, str] | None = None,
    start: int | None = None,
) -> Iterator[Span]:
    """A span under the current one, or one that continues the trace in ``carrier``; an exception
    marks it as failed and goes on.

    Args:
        redelivered: it gets a link to the creation of what is delivered again.
        answers: the carrier of what it answers: it gets a link to that.
        start: when it began, in nanoseconds since 1970; now if not given.
    """
    parent = None if carrier is None else propagate.extract(dict(carrier))
    links = [_link(parent, {"elesh.redelivery": True})] if redelivered and parent else []
    if answers:
        links.append(_link(propagate.extract(dict(answers)), {"elesh.answers": True}))
    with trace.get_tracer("elesh").start_as_current_span(
        name,
        context=parent,
        kind=kind,
        attributes=dict(attributes or {}),
        links=links,
        start_time=start,
    ) as current:
        try:
            yield current
        except Exception as error:
            # The SDK marks the span as failed; ``error.type`` is ours to add.
            code = getattr(error, "code", None)
            failed = code if isinstance(code, str) else type(error).__qualname__
            current.set_attribute("error.type", failed)
            raise


@contextmanager
def linked_span(
    carrier: Mapping[str, str], name: str, attributes: Attributes | None = None
) -> Iterator[Span]:
    """A trace of its own that links back to the one in ``carrier``: a replay, a redrive."""
    link = _link(propagate.extract(dict(carrier)), {"elesh.origin": True})
    tracer = trace.get_tracer("elesh")
    with tracer.start_as_current_span(
        name, context=Context(), attributes=dict(attributes or {}), links=[link]
    ) as current:
        yield current


def record_spans(spans: Sequence[SpanTimes]) -> None:
    """Spans under the current one for what another process measured, each under its parent."""
    tracer = trace.get_tracer("elesh")
    made: list[tuple[Context, Span, int]] = []
    for name, parent, begun, ended in spans:
        context = made[parent][0] if parent >= 0 else None
        own = tracer.start_span(name, context=context, start_time=begun)
        made.append((trace.set_span_in_context(own), own, ended))
    for _, own, ended in reversed(made):
        own.end(ended)


def _link(context: Context, attributes: Attributes) -> Link:
    return Link(trace.get_current_span(context).get_span_context(), dict(attributes))


def carrier_of(cause: Mapping[str, str] | None = None) -> dict[str, str]:
    """The current context as message fields; empty where nothing is traced.

    Args:
        cause: the context of a message that the new one follows from: it goes on, where there is
            one. It is parsed and written anew, since it comes unchecked.
    """
    fields: dict[str, str] = {}
    if cause:
        propagate.inject(fields, propagate.extract(dict(cause)))
    if not fields:
        propagate.inject(fields)
    return fields


Operation = Literal["create", "send", "receive", "process", "settle"]


def messaging(
    operation: Operation,
    stream: str,
    *,
    entry_id: str = "",
    group: str = "",
    server: tuple[str, int] | None = None,
) -> dict[str, str | int | float | bool]:
    """The attributes of a span of one operation on one message of a stream (OpenTelemetry's
    conventions for messaging).

    Such a span is named ``{operation} {stream}``. Creating a message is PRODUCER; sending,
    receiving and settling are CLIENT (the context that travels is the creation's), processing is
    CONSUMER.

    Args:
        server: address and port of the server that was spoken to; a socket's path has port 0.
    """
    attributes: dict[str, str | int | float | bool] = {
        "messaging.system": "redis",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": stream,
    }
    if server is not None:
        attributes["server.address"] = server[0]
        if server[1]:
            attributes["server.port"] = server[1]
    if entry_id:
        attributes["messaging.message.id"] = entry_id
    if group:
        attributes["messaging.consumer.group.name"] = group
    return attributes
