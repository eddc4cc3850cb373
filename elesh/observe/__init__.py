"""Traces, metrics, logs and the audit log: what happened, to whom, how often, how long."""

from . import otel as otel  # isort: skip  (first: it mends what the libraries cannot read)
from .audit import AuditFile, Fault, Link, audit_event, line_of, read_line, sound, verify
from .logs import SparseLines, get_logger, setup_logging
from .tracing import (
    carrier_of,
    linked_span,
    mark_failed,
    messaging,
    record_spans,
    setup_tracing,
    shutdown_tracing,
    span,
)

__all__ = [
    "AuditFile",
    "Fault",
    "Link",
    "SparseLines",
    "audit_event",
    "carrier_of",
    "get_logger",
    "line_of",
    "read_line",
    "linked_span",
    "mark_failed",
    "messaging",
    "record_spans",
    "setup_logging",
    "setup_tracing",
    "shutdown_tracing",
    "span",
    "sound",
    "verify",
]
