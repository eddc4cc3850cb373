"""Traces: whole or missing, never torn; kept in bounded files; and never waited for."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, set_span_in_context
from rich.console import Console

from elesh.observe import carrier_of, linked_span, record_spans, span
from elesh.observe import tracing as tracing_module
from elesh.observe.spanfile import (
    RecordedSpan,
    SpanFile,
    find_trace,
    print_trace,
    read_spans,
    tree_rows,
)
from elesh.observe.tracing import WholeTrees, shutdown_tracing


@contextmanager
def provided(monkeypatch: pytest.MonkeyPatch, exporter: SpanExporter) -> Iterator[TracerProvider]:
    """A provider of the test's own in place of the process's, which can be set only once."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(WholeTrees([SimpleSpanProcessor(exporter)]))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    yield provider


def test_a_part_of_a_trace_leaves_only_when_its_first_span_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = InMemorySpanExporter()
    with provided(monkeypatch, exporter) as provider:
        tracer = provider.get_tracer("test")
        first = tracer.start_span("first")
        inner = tracer.start_span("inner", context=set_span_in_context(first))
        tracer.start_span("innermost", context=set_span_in_context(inner)).end()
        inner.end()
        # A process that is killed here has exported nothing whose parent is missing.
        assert exporter.get_finished_spans() == ()
        first.end()
        names = [each.name for each in exporter.get_finished_spans()]
        assert names == ["innermost", "inner", "first"]
        tracer.start_span("latecomer", context=set_span_in_context(first)).end()
        assert exporter.get_finished_spans()[-1].name == "latecomer"


def test_what_follows_from_a_message_continues_the_context_that_it_came_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = InMemorySpanExporter()
    with provided(monkeypatch, exporter):
        with span("create"):
            sent = carrier_of()
        with span("process", kind=SpanKind.CONSUMER, carrier=sent, redelivered=True):
            assert carrier_of(sent) == sent
            assert carrier_of({}) == carrier_of() != sent
            assert carrier_of({"traceparent": "00-not-a-context"}) == carrier_of()
            record_spans([("join", -1, 1_000, 9_000), ("gates", 0, 2_000, 3_000)])
        with linked_span(sent, "replay"):
            pass
        with span("create outcomes", answers=sent):
            pass
    create, gates, join, process, replay, outcome = exporter.get_finished_spans()
    assert [link.context.span_id for link in outcome.links] == [create.context.span_id]
    for own, parent in ((process, create), (join, process), (gates, join)):
        assert own.parent is not None
        assert own.parent.span_id == parent.context.span_id
    assert (gates.start_time, gates.end_time) == (2_000, 3_000)
    assert process.links[0].context.span_id == create.context.span_id
    assert replay.context.trace_id != create.context.trace_id
    assert replay.links[0].context.trace_id == create.context.trace_id


class Stalled(SpanExporter):
    """A collector that takes a request and never answers."""

    def __init__(self) -> None:
        self.answer, self.threads = threading.Event(), set[str]()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.threads.add(threading.current_thread().name)
        self.answer.wait()
        return SpanExportResult.FAILURE


def test_a_collector_that_stalls_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Stalled()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(WholeTrees([BatchSpanProcessor(exporter, max_queue_size=600)]))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(tracing_module, "_END_SECONDS", 0.2)
    for number in range(5_000):  # far more than the queue holds: it would block here
        with span("work", attributes={"number": number}):
            pass
    begun = time.monotonic()
    shutdown_tracing()
    assert time.monotonic() - begun < 25  # the SDK's own end takes thirty seconds
    assert threading.current_thread().name not in exporter.threads
    exporter.answer.set()


WRITER = """
import sys
from pathlib import Path
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from elesh.observe.spanfile import SpanFile
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(SpanFile(20_000, Path(sys.argv[1]))))
tracer = provider.get_tracer("test")
for number in range(100):
    tracer.start_span("work", attributes={"elesh.key": f"{sys.argv[2]}-{number}"}).end()
"""


@pytest.mark.slow
def test_processes_share_a_file_that_stays_bounded_and_whole(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    files = sorted(tmp_path.glob("spans*.jsonl"))
    assert [file.name for file in files] == ["spans.jsonl", "spans.old.jsonl"]
    assert all(0 < file.stat().st_size <= 20_000 for file in files)
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert all(json.loads(line)["name"] == "work" for line in lines)
    assert len(list(read_spans(tmp_path))) == len(lines)
    (found,) = find_trace(str(json.loads(lines[-1])["attributes"]["elesh.key"]), tmp_path)
    assert found.seconds >= 0
    assert find_trace("no such key", tmp_path) == []


def test_a_folder_that_cannot_be_written_fails_no_span(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    exporter = SpanFile(1000, tmp_path / "file" / "folder")
    assert exporter.export([]) is SpanExportResult.FAILURE


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "spans.jsonl").write_text('{"trace": "a"\nnull\n{"other": 1}\n')
    assert list(read_spans(tmp_path)) == []


NAMES = st.sampled_from([format(n, "016x") for n in range(6)])


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_the_waterfall_shows_each_span_once_whatever_its_parent(
    drawn: list[tuple[str, str, int, int]],
) -> None:
    spans = [
        RecordedSpan("t", own, parent if parent < own else "", "n", "s", "i", a, a + b)
        for own, parent, a, b in {each[0]: each for each in drawn}.values()
    ]
    assert sorted(s.span for _, s in tree_rows(spans)) == sorted(s.span for s in spans)
    console = Console(width=90, file=io.StringIO())
    print_trace(console, spans)
    assert f"{len(spans)} spans" in console.file.getvalue()
