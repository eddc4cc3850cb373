"""Traces and logs: what happened, to whom, and how long it took."""

from .logs import get_logger, setup_logging
from .tracing import carrier_of, setup_tracing, shutdown_tracing, span, span_from

__all__ = [
    "carrier_of",
    "get_logger",
    "setup_logging",
    "setup_tracing",
    "shutdown_tracing",
    "span",
    "span_from",
]
