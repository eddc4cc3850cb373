"""A small OTLP/HTTP receiver: collects the spans and metrics that processes export."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Spans by trace id, from whichever process."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[tuple[str, Span]] = []
        self.metrics: set[str] = set()
        """Names of all metrics that came."""
        self._lock = threading.Lock()

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/metrics":
            self._take_metrics(ExportMetricsServiceRequest.FromString(body))
        else:
            assert path == "/v1/traces", path
            self._take_spans(body)

    def _take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        with self._lock:
            self.metrics |= {
                metric.name
                for group in request.resource_metrics
                for scope in group.scope_metrics
                for metric in scope.metrics
            }

    def _take_spans(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            for group in request.resource_spans:
                attributes = {a.key: a.value.string_value for a in group.resource.attributes}
                for scope in group.scope_spans:
                    self.spans += [(attributes["service.name"], span) for span in scope.spans]

    def traces(self) -> dict[bytes, list[tuple[str, Span]]]:
        found: dict[bytes, list[tuple[str, Span]]] = {}
        with self._lock:
            for service, span in self.spans:
                found.setdefault(span.trace_id, []).append((service, span))
        return found

    def attribute(self, span: Span, name: str) -> str:
        return next((a.value.string_value for a in span.attributes if a.key == name), "")


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
