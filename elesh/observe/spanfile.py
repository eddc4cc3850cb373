"""Finished spans in a bounded file of this machine, so that traces can be read without a collector;
and a trace as a waterfall in the terminal.

Promises: one JSON object a line, whole lines only, whichever processes write; at most two files of
``limit`` bytes each (the older one is dropped when the newer is full); a folder that cannot be
written is said once and never fails a span. It holds what this machine recorded: where trainer and
workers are apart, a collector sees the whole.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elesh._process import state_folder

from .logs import get_logger, printable
from .terminal import escape

REPLAYS = "elesh-replay"
"""The service that replays are recorded under."""
_LEAST_OF_ID = 8
_NAME, _OLD = "spans.jsonl", "spans.old.jsonl"
_log = get_logger(__name__)


@dataclass(frozen=True)
class RecordedSpan:
    """One finished span."""

    trace: str
    """32 hex digits."""
    span: str
    """16 hex digits."""
    parent: str
    """16 hex digits, or empty for the first of the trace."""
    name: str
    service: str
    instance: str
    start: int
    """Nanoseconds since 1970."""
    end: int
    failed: str = ""
    """What failed; empty where nothing did."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    """``name``, ``at`` (nanoseconds since 1970) and ``attributes`` each."""
    links: Sequence[str] = ()
    """Trace ids."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.start) / 1e9


class SpanFile(SpanExporter):
    """Appends spans to the file; see the module's promises.

    Args:
        limit: bytes of each of the two files.
        folder: default: ``traces`` in the user's state folder.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit = limit
        self._folder = folder or _folder()
        self._complained = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append one line a span."""
        data = "".join(json.dumps(_values(span), default=str) + "\n" for span in spans).encode()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The lock has a file of its own: the one that is written changes its name.
            with open(self._folder / "lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                path = self._folder / _NAME
                if path.exists() and path.stat().st_size + len(data) > self._limit:
                    path.replace(self._folder / _OLD)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                with open(os.open(path, flags, 0o600), "ab") as file:
                    file.write(data)
        except OSError as error:
            if not self._complained:
                _log.warning("traces are not kept", folder=str(self._folder), reason=str(error))
                self._complained = True
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def read_spans(folder: Path | None = None, *, containing: str = "") -> Iterator[RecordedSpan]:
    """The spans whose line contains a text, oldest first; a torn or foreign line is passed over."""
    for name in (_OLD, _NAME):
        path = (folder or _folder()) / name
        if not path.exists():
            continue
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if containing in line and (span := _read(line)) is not None:
                    yield span


def find_trace(what: str = "", folder: Path | None = None) -> list[RecordedSpan]:
    """The spans of one trace, by start: the newest that ``what`` stands in, a replay's only where
    there is no other.

    Args:
        what: a decision's key, a run, a trace id or its first eight digits at least, or any
            attribute's value; empty: any trace.
    """
    found = [span for span in read_spans(folder, containing=what) if _speaks_of(span, what)]
    if not found:
        return []
    begun: dict[str, int] = {}
    for span in found:
        begun[span.trace] = min(span.start, begun.get(span.trace, span.start))
    newest = max(
        found, key=lambda span: (_is_of(span, what), not _is_replay(span), begun[span.trace])
    ).trace
    spans = read_spans(folder, containing=newest)
    return sorted((s for s in spans if s.trace == newest), key=lambda s: (s.start, -s.end))


def _speaks_of(span: RecordedSpan, what: str) -> bool:
    is_trace = len(what) >= _LEAST_OF_ID and span.trace.startswith(what)
    return not what or is_trace or what in map(str, span.attributes.values())


def _is_of(span: RecordedSpan, what: str) -> bool:
    """Whether it is the key's own trace, not one that only refers to it, as a replay's does."""
    return span.attributes.get("elesh.key") == what


def _is_replay(span: RecordedSpan) -> bool:
    return span.service == REPLAYS


def _folder() -> Path:
    return state_folder() / "traces"


def _values(span: ReadableSpan) -> dict[str, Any]:
    context, resource = span.get_span_context(), span.resource.attributes
    assert context is not None
    return {
        "trace": format(context.trace_id, "032x"),
        "span": format(context.span_id, "016x"),
        "parent": format(span.parent.span_id, "016x") if span.parent else "",
        "name": span.name,
        "service": str(resource.get("service.name", "")),
        "instance": str(resource.get("service.instance.id", "")),
        "start": span.start_time,
        "end": span.end_time,
        "failed": "" if span.status.is_ok else (span.status.description or "failed"),
        "attributes": dict(span.attributes or {}),
        "events": [
            {
                "name": event.name,
                "at": event.timestamp,
                # The stack of an exception is in the log.
                "attributes": {
                    k: v for k, v in (event.attributes or {}).items() if k != "exception.stacktrace"
                },
            }
            for event in span.events
        ],
        "links": [format(link.context.trace_id, "032x") for link in span.links],
    }


def _read(line: str) -> RecordedSpan | None:
    try:
        return RecordedSpan(**json.loads(line))
    except (ValueError, TypeError):
        return None


_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
_BAR_SHARE = 0.3
_SHOWN = ("elesh.run", "elesh.epoch", "elesh.key", "elesh.outcome")
_EIGHTHS: tuple[str, ...] = ("", *"▏▎▍▌▋▊▉")


def tree_rows(spans: Sequence[RecordedSpan]) -> Iterator[tuple[str, RecordedSpan]]:
    """The spans in order of the tree, each with the guides that lead to it.

    A span whose parent is not among them stands at the left, as another first one.
    """
    known = {span.span for span in spans}
    children: dict[str, list[RecordedSpan]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        children[span.parent if span.parent in known else ""].append(span)

    def below(span: RecordedSpan, guide: str) -> Iterator[tuple[str, RecordedSpan]]:
        own = children[span.span]
        for child in own:
            last = child is own[-1]
            yield guide + ("└─ " if last else "├─ "), child
            yield from below(child, guide + ("   " if last else "│  "))

    for root in children[""]:
        yield "", root
        yield from below(root, "")


def print_trace(console: Console, spans: Sequence[RecordedSpan]) -> None:
    """Print the waterfall of one trace's spans, of which there is at least one."""
    begun, ended = min(s.start for s in spans), max(s.end for s in spans)
    speakers = dict.fromkeys((s.service, s.instance) for s in spans)
    colours = dict(zip(speakers, itertools.cycle(_COLOURS), strict=False))
    _print_head(console, spans, (ended - begun) / 1e9)
    width = max(10, int(console.width * _BAR_SHARE))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", width=width, no_wrap=True)
    for guide, span in tree_rows(spans):
        colour = "red" if span.failed else colours[span.service, span.instance]
        table.add_row(
            Text.assemble((guide, "dim"), (printable(span.name), colour)),
            _time((span.start - begun) / 1e9),
            _time(span.seconds),
            Text(_bar(span, begun, ended, width), style=colour),
        )
        inside = guide.replace("├─ ", "│  ").replace("└─ ", "   ")
        for note in _notes(span):
            table.add_row(Text.assemble((inside, "dim"), (f"   {printable(note)}", "red")))
    console.print(table)
    for (service, instance), colour in colours.items():
        console.print(Text.assemble(("■ ", colour), printable(f"{service} {instance}")))


def _print_head(console: Console, spans: Sequence[RecordedSpan], seconds: float) -> None:
    console.print(f"trace {spans[0].trace}: {len(spans)} spans in {_time(seconds)}")
    for name in _SHOWN:
        values = {escape(s.attributes[name]) for s in spans if name in s.attributes}
        if values:
            console.print(f"{name.removeprefix('elesh.')} {', '.join(sorted(values))}", style="dim")


def _notes(span: RecordedSpan) -> list[str]:
    """What a reader should not miss: failures, fallbacks, redeliveries."""
    notes = [span.failed] if span.failed else []
    for event in span.events:
        attributes = ", ".join(f"{name} {value}" for name, value in event["attributes"].items())
        if event["name"] != "exception":
            notes.append(f"{event['name']}: {attributes}")
    if int(span.attributes.get("elesh.deliveries", 1)) > 1:
        notes.append(f"delivery {span.attributes['elesh.deliveries']}")
    return notes


def _bar(span: RecordedSpan, begun: int, ended: int, width: int) -> str:
    """The span's place in the whole, in eighths of a cell; at least one eighth."""
    scale = width * 8 / max(1, ended - begun)
    left = min(round((span.start - begun) * scale), width * 8 - 1)
    length = max(1, round((span.end - span.start) * scale))
    lead, offset = divmod(left, 8)
    # A cell is filled from the left only: a bar that begins inside one takes the whole of it.
    full, rest = divmod(length + offset, 8)
    return (" " * lead + "█" * full + _EIGHTHS[rest])[:width]


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
