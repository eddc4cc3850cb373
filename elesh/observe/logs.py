"""Text for people: log lines on standard error, and escaping of untrusted text.

A log line is one event, ``message key=value ...``, or JSON on request, with the id of the trace it
belongs to, where there is one. Values that look like URLs with a password are masked before
anything is written. Under another logging set-up than ours (a framework's, or Python's own without
any) a line has its figures, too. A reader of the log that stalls holds up nothing, where it is
Elesh that writes.

Promises: text that is :func:`printable` has no escape sequence, no control character and no
character that changes the direction of writing; each stands there as its number, for instance
``\u001b``. JSON stays JSON. A log line is printable: a text from the bus can neither begin a line
of its own nor steer a terminal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any, Literal

from opentelemetry import trace

from elesh.settings.masking import masked_line

# C0, DEL, C1, marks and overrides of direction, line and paragraph separators, lone surrogates.
_OTHERS = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_ONE_LINE = re.compile(f"[\x00-\x1f{_OTHERS}]")
LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_OTHERS}]")
"""What is not printable in a text of several lines."""


def moment(at: datetime) -> str:
    """A time for people, to the second, in UTC: the one form everywhere."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def iso(at: datetime) -> str:
    """A time for machines: ISO 8601 in UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters as ``\\uXXXX``; with ``lines`` tabs and line ends stay."""
    return (LINES if lines else _ONE_LINE).sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_QUEUED_LINES = 1000
_FLUSH_SECONDS = 1.0


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
        tail = "".join(f" {key}={value}" for key, value in fields.items())
        line = printable(f"{at[11:23]} {record.levelname.lower():7} {message}{tail}")
        if failed:
            line = f"{line} exception={printable(failed, lines=True)}"
        return masked_line(line)


@dataclass(frozen=True)
class _Event:
    """What is logged: other formatters than ours write it with ``str``."""

    message: str
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        tail = "".join(f" {key}={value}" for key, value in self.fields.items())
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


class _Writer(logging.Handler):
    """Writes lines from a thread of its own: a reader that stalls or goes holds up nothing.

    Lines that find no place in the queue are counted, and the next one that does says how many.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._stream, self._descriptor = stream, _descriptor(stream)
        self._lines: queue.Queue[str] = queue.Queue(_QUEUED_LINES)
        self._dropped, self._begun = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; called with the handler's lock, which is never held for long."""
        try:
            line = self.format(record)
        except Exception:
            line = f"a log line that cannot be formatted: {record.msg!r}"
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._write, name="elesh-log", daemon=True).start()
        if self._dropped and not self._lines.full():
            line, self._dropped = f"({self._dropped} log lines found no reader)\n{line}", 0
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait for what is queued to be written, at most a second: called at the process's end."""
        if self._begun:
            waiting = threading.Thread(target=self._lines.join, daemon=True)
            waiting.start()
            waiting.join(_FLUSH_SECONDS)

    def _write(self) -> None:
        while True:
            data = (self._lines.get() + "\n").encode(errors="backslashreplace")
            with contextlib.suppress(OSError, ValueError):  # a reader that is gone
                self._put(data)
            self._lines.task_done()

    def _put(self, data: bytes) -> None:
        if self._descriptor is None:
            self._stream.write(data.decode())
            self._stream.flush()
            return
        # Not by the stream: its lock, held by a thread that waits for a reader, ends in an abort
        # when the interpreter ends.
        while data:
            data = data[os.write(self._descriptor, data) :]


class _LastResort(_Writer):
    """For a script that has set up no logging: warnings on standard error, as Python's own last
    resort writes them, but without waiting. It is silent where there is any other handler."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; a forked process, which has no thread, writes it itself."""
        others = [*logging.getLogger().handlers, *logging.getLogger("elesh").handlers]
        if sys.stderr is None or any(handler is not self for handler in others):
            return
        if not self._begun:
            # A notebook's standard error is no file, whatever number it has.
            self._stream = sys.stderr
            own = sys.stderr is sys.__stderr__
            self._descriptor = _descriptor(sys.stderr) if own else None
        if os.getpid() == self._process:
            super().emit(record)
        else:
            self._put(f"{self.format(record)}\n".encode(errors="backslashreplace"))


def _descriptor(stream: IO[str]) -> int | None:
    """The file behind a stream, None if there is none, as in tests."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def setup_logging(style: Literal["plain", "json"] = "plain", level: str = "INFO") -> None:
    """Send the logs of ``elesh`` to standard error, and the warnings of other libraries; calling it
    again replaces the style.

    A reader that stalls or goes away holds up nothing: lines wait in a bounded queue, and those
    that find no place are counted.
    """
    handler = _Writer(sys.stderr)
    handler.setFormatter(_Formatter(style))
    logger, root = logging.getLogger("elesh"), logging.getLogger()
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    root.handlers[:] = [other for other in root.handlers if not isinstance(other, _Writer)]
    root.addHandler(handler)
    logging.captureWarnings(True)


logging.getLogger("elesh").addHandler(_LastResort())


_SPARSE_SECONDS = 60.0


class SparseLines:
    """Warnings about what may happen often: one line a minute at most, which says how many
    others it stands for. Safe to use from any thread."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def warning(self, message: str, times: int = 1, **fields: Any) -> None:
        """Say it, or hold it back; ``times`` it happened."""
        now = time.monotonic()
        with self._lock:
            self._held[message] += times
            if now < self._next.get(message, now):
                return
            self._next[message] = now + _SPARSE_SECONDS
            held = self._held.pop(message)
        self._logger.warning(message, **fields, **({"times": held} if held > 1 else {}))
