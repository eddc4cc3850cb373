"""A worker is killed in the middle of a run: every decision is still one whole, connected trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import yaml
from collector import Collector, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from station import Station
from test_demo import SCHEDULE

from leyline.streams import DECISIONS

STORY = {
    "checkpoint", "create checkpoints", "send checkpoints",
    "process checkpoints", "fetch blobs", "analyse channel", "read", "gates", "join",
    "apply decision", "create outcomes", "send outcomes", "process outcomes",
}  # fmt: skip
"""The spans that every decision's trace has."""


@pytest.fixture(scope="module")
def told(
    redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Collector]:
    """The figures of a demo run, one of whose workers was killed, and what a collector got."""
    folder = tmp_path_factory.mktemp("killed")
    sections = {
        "structured_pruning": {"safety_schedule": SCHEDULE},
        "bus": {"partition": "killed", "lease_seconds": 2.0},
        "observe": {"heartbeat_seconds": 0.2},
    }
    (folder / "short.yaml").write_text(yaml.safe_dump({"elesh": sections}))
    station = Station(redis_url, "killed", folder)
    command = [
        sys.executable, "-m", "elesh.cli", "demo", "--epochs", "16", "--seed", "11",
        "--workers", "2", "--settings", str(folder / "short.yaml"),
        "--json", str(folder / "out.json"),
    ]  # fmt: skip
    with collecting() as collector:
        environment = {
            "ELESH_REDIS_URL": redis_url,
            "OMP_NUM_THREADS": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        demo = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            kill_one_at_work(station)
            output, _ = demo.communicate(timeout=800)
        finally:
            demo.kill()
        assert demo.returncode == 0, output.decode()
    return json.loads((folder / "out.json").read_text()), collector


def kill_one_at_work(station: Station) -> None:
    """Kill a worker, with its child, while it analyses something."""
    # Imports, the network and the proof of its groups come first.
    station.wait_for(lambda: len(station.read(DECISIONS)) >= 3, "the run to be on its way", 120)
    first = station.on_bus(lambda bus: bus.registry.workers())[0]
    worker = psutil.Process(first.pid)
    worker.children()[0].suspend()  # what it takes from now on, it does not finish

    def at_work() -> bool:
        states = station.on_bus(lambda bus: bus.registry.workers())
        # Its child is stopped: an entry that it has held for so long, it cannot have settled; and
        # what it had to say of it so far would be out, since batches of spans wait half a second.
        (state,) = [state for state in states if state.pid == worker.pid]
        return bool(state.key) and state.child == "wedged" and time.time() - state.since > 3

    station.wait_for(at_work, "the worker to be at work")
    worker.kill()


@pytest.mark.timeout(900)
def test_every_decision_is_one_connected_tree_from_checkpoint_to_outcome(
    told: tuple[dict[str, Any], Collector],
) -> None:
    figures, collector = told
    assert len(figures["decisions"]) == figures["epochs"]
    assert figures["unanswered"] == []
    traces = collector.traces()
    for decision in figures["decisions"]:
        (spans,) = [
            [span for _, span in spans]
            for spans in traces.values()
            if any(collector.attribute(s, "elesh.key") == decision["key"] for _, s in spans)
        ]
        assert [span.name for span in spans if not span.parent_span_id] == ["checkpoint"]
        known = {span.span_id for span in spans}
        orphans = [s.name for s in spans if s.parent_span_id and s.parent_span_id not in known]
        assert orphans == []
        names = {span.name for span in spans}
        assert names >= STORY, decision["key"]
        # Where the first receiver was killed, the other one received it as a redelivery.
        assert names & {"receive checkpoints", "receive redeliveries"}
        # Of several levels the join settles, which is a piece of work of its own.
        assert names & {"settle checkpoints", "settle work"}
    orphans = [
        span.name
        for spans in traces.values()
        for _, span in spans
        if span.parent_span_id and span.parent_span_id not in {s.span_id for _, s in spans}
    ]
    assert orphans == []


def test_the_redelivery_is_a_span_of_its_own_linked_to_the_creation(
    told: tuple[dict[str, Any], Collector],
) -> None:
    _, collector = told
    spans = [span for _, span in collector.spans]
    again = [span for span in spans if deliveries(span) > 1]
    assert again
    for span in again:
        (created,) = [s for s in spans if s.span_id == span.links[0].span_id]
        assert created.name == "create checkpoints"
        assert created.trace_id == span.trace_id


def test_spans_follow_the_conventions_for_messaging(
    told: tuple[dict[str, Any], Collector],
) -> None:
    _, collector = told
    kinds = {
        "create": Span.SPAN_KIND_PRODUCER, "send": Span.SPAN_KIND_CLIENT,
        "receive": Span.SPAN_KIND_CLIENT, "process": Span.SPAN_KIND_CONSUMER,
        "settle": Span.SPAN_KIND_CLIENT,
    }  # fmt: skip
    found = set()
    for _, span in collector.spans:
        operation, _, stream = span.name.partition(" ")
        if operation not in kinds:
            continue
        found.add(operation)
        assert span.kind == kinds[operation]
        for name, value in {
            "messaging.system": "redis",
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
            "messaging.destination.name": stream,
        }.items():
            assert collector.attribute(span, name) == value
        if operation in {"receive", "process", "settle"}:
            assert collector.attribute(span, "messaging.message.id")
            assert collector.attribute(span, "messaging.consumer.group.name") == "elesh-workers"
    assert found == kinds.keys()


def deliveries(span: Span) -> int:
    values = [a.value.int_value for a in span.attributes if a.key == "elesh.deliveries"]
    return values[0] if values else 0
