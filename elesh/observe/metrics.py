"""OpenTelemetry metrics: on ``/metrics`` for Prometheus, and by OTLP/HTTP if configured.

Promises: every name is listed in docs/observing.md; labels are from small fixed sets (levels,
gates, fallbacks, streams), never runs or keys; until :func:`setup_metrics` is called nothing is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

from .logs import get_logger
from .tracing import in_time, is_exported, quiet_exporters, resource_of

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 180, 240, 300, 600)
_meter = metrics.get_meter("elesh")
_log = get_logger(__name__)

ANALYSES = _meter.create_counter(
    "elesh.analyses", description="Analyses that ended; by level and result (completed, failed)."
)
ANALYSIS_SECONDS = _meter.create_histogram(
    "elesh.analysis.duration",
    unit="s",
    description="Seconds of an analysis in the compute child; by level.",
    explicit_bucket_boundaries_advisory=_BUCKETS,
)
PROCESS_SECONDS = _meter.create_histogram(
    "messaging.process.duration",
    unit="s",
    description="Seconds from receiving an entry to its end; by stream.",
    explicit_bucket_boundaries_advisory=_BUCKETS,
)
DECISIONS = _meter.create_counter(
    "elesh.decisions",
    description="Decisions committed, a joint one once for each of its levels; by level, verdict "
    "and reason (the first gate that failed).",
)
OUTCOMES = _meter.create_counter(
    "elesh.outcomes",
    description="What trainers made of decisions, of a joint one once for each level that it "
    "removes of; by level and result.",
)
REMOVED_UNITS = _meter.create_counter(
    "elesh.removed.units", description="Units that trainers removed for good; by level."
)
SAVED_PARAMETERS = _meter.create_counter(
    "elesh.saved.parameters", description="Parameters that trainers removed for good."
)
SAVED_MACS = _meter.create_counter(
    "elesh.saved.macs",
    description="Multiply-accumulates of one sample that the removed units had, as decided.",
)
FALLBACKS = _meter.create_counter(
    "elesh.fallbacks",
    description="Fallbacks of the failure table that were taken; by name.",
)
TRAINER_FALLBACKS = _meter.create_counter(
    "elesh.trainer.fallbacks",
    description="What trainers did with less than was asked for, as they reported it: cuts that "
    "were shortened or went without a part of reconstruction, checkpoints measured on fewer "
    "samples, or with the accuracy of an epoch before; by name.",
)
DEAD_LETTERS = _meter.create_counter(
    "elesh.dead_letters", description="Messages that could not be served; by code."
)
REDELIVERIES = _meter.create_counter(
    "elesh.redeliveries",
    description="Entries that went round again; by cause (crash, exception, handover).",
)
BLOB_BYTES = _meter.create_counter(
    "elesh.blob.read", unit="By", description="Bytes of blobs fetched."
)

Reading = tuple[float, Mapping[str, str]]
"""A figure and its labels."""


def gauge(name: str, description: str, read: Callable[[], Iterable[Reading]]) -> None:
    """A gauge that is read at every scrape; ``read`` must not wait."""

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(float(value), labels) for value, labels in read()]

    _meter.create_observable_gauge(name, [observe], description=description)


def setup_metrics(service: str, instance: str, *, prometheus: bool) -> bool:
    """Keep metrics for their readers; returns whether there are any.

    A second call in one process changes nothing.

    Args:
        prometheus: whether ``/metrics`` will be served from here.
    """
    try:
        return _set_up(service, instance, prometheus)
    except Exception as error:  # whatever the SDK makes of a variable that it cannot read
        _log.warning("no metrics: OTEL settings cannot be met", reason=f"{error!r}"[:300])
        return False


def _set_up(service: str, instance: str, prometheus: bool) -> bool:
    if isinstance(metrics.get_meter_provider(), MeterProvider):
        return True
    readers: list[MetricReader] = []
    if prometheus:
        readers.append(PrometheusMetricReader(scope_info_enabled=False))
    if is_exported("METRICS"):
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    if not readers:
        return False
    quiet_exporters()
    resource = resource_of(service, instance)
    metrics.set_meter_provider(MeterProvider(readers, resource=resource, shutdown_on_exit=False))
    return True


def shutdown_metrics() -> None:
    """Send what is left, for at most three seconds."""
    provider = metrics.get_meter_provider()
    if isinstance(provider, MeterProvider):
        in_time(provider.shutdown)


def p95(values: Sequence[float]) -> float:
    """The 95th percentile by the nearest rank; 0 of nothing."""
    if not values:
        return 0.0
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]
