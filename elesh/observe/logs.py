"""Logs on standard error: one line an event, ``message key=value ...``, or JSON on request.

Every line carries the id of the trace it belongs to, where there is one. Values that look like
URLs with a password are masked before anything is written, and control characters are written as
their numbers: a text from the bus can neither begin a line of its own nor steer a terminal. Under
another logging set-up than ours (a framework's, or Python's own without any) a line has its
figures, too.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry import trace

from elesh.settings.masking import masked_line

from .printable import printable

__all__ = ["get_logger", "setup_logging"]


class _Formatter(logging.Formatter):
    def __init__(self, style: Literal["plain", "json"]) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            fields["trace_id"] = format(context.trace_id, "032x")
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = record.msg
        message = event.message if isinstance(event, _Event) else record.getMessage()
        failed = self.formatException(record.exc_info) if record.exc_info else ""
        if failed and self._json:
            fields["exception"] = failed
        if self._json:
            head = {"at": at, "level": record.levelname.lower(), "message": message}
            return masked_line(json.dumps(head | fields, default=str))
        if context.is_valid:
            # Enough for elesh trace to find it.
            fields["trace"] = fields.pop("trace_id")[:8]
        line = printable(f"{at[11:23]} {record.levelname.lower():7} {_Event(message, fields)}")
        if failed:
            line = f"{line} exception={printable(failed, lines=True)}"
        return masked_line(line)


class _Event:
    """What is logged: other formatters than ours write it with ``str``."""

    def __init__(self, message: str, fields: Mapping[str, Any]) -> None:
        self.message, self._fields = message, fields

    def __str__(self) -> str:
        tail = "".join(f" {key}={value}" for key, value in self._fields.items())
        return masked_line(printable(f"{self.message}{tail}"))


class Logger:
    """A logger that takes the figures of an event as keywords."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, message: str, **fields: Any) -> None:
        """Something that operators expect."""
        self._log(logging.INFO, message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Something that a fallback, a retry or a refusal answered."""
        self._log(logging.WARNING, message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Something that needs a person."""
        self._log(logging.ERROR, message, fields)

    def exception(self, message: str, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._log(logging.ERROR, message, fields, traceback=True)

    def _log(
        self, level: int, message: str, fields: Mapping[str, Any], *, traceback: bool = False
    ) -> None:
        event, extra = _Event(message, fields), {"fields": fields}
        self._logger.log(level, event, extra=extra, exc_info=traceback, stacklevel=3)


def get_logger(name: str) -> Logger:
    """The logger of a module."""
    return Logger(name)


def setup_logging(style: Literal["plain", "json"] = "plain", level: str = "INFO") -> None:
    """Send the logs of ``elesh`` to standard error; calling it again replaces the style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(style))
    root = logging.getLogger("elesh")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
