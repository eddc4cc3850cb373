"""Traces, metrics and logs: what happened, to whom, how often, and how long it took."""

from .logs import get_logger, setup_logging
from .messaging import messaging
from .tracing import (
    carrier_of,
    linked_span,
    onward,
    record_stages,
    setup_tracing,
    shutdown_tracing,
    span,
    span_from,
)

__all__ = [
    "carrier_of",
    "get_logger",
    "linked_span",
    "messaging",
    "onward",
    "record_stages",
    "setup_logging",
    "setup_tracing",
    "shutdown_tracing",
    "span",
    "span_from",
]
