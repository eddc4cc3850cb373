"""A run with failures as an OTLP receiver sees it: each failure is found by an error status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from collector import Collector, collecting
from guarded import World, told
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from redis import Redis
from station import Station, checkpoint
from trainer_nets import batches, example

from elesh.observe.tracing import SystemIds, WholeTrees
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Session
from leyline import CheckpointBundle, PruningOutcome, StructuralPruningDecision
from leyline.streams import CHECKPOINTS, DEAD

FAILURES = {
    "malformed",  # an entry that is no message
    "unknown_decision",  # an outcome of a decision that was never made
    "ChildDied",  # an analysis whose process was killed
    "refused",  # a decision whose evaluation raised
    "rolled_back",  # a decision whose masked network did badly, and a cut that did badly later
    "not_published",  # a message of a session whose bus never came
}


@contextmanager
def traced(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a trainer whose spans go to the collector."""
    provider = TracerProvider(
        resource=Resource.create({"service.name": "elesh-trainer"}),
        shutdown_on_exit=False,
        id_generator=SystemIds(),  # what is rolled back has its random state back, too
    )
    exporter = OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")
    provider.add_span_processor(WholeTrees([SimpleSpanProcessor(exporter)]))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    yield
    provider.shutdown()


def failed(spans: list[Span], collector: Collector) -> set[str]:
    found = {
        (collector.attribute(span, "error.type"), span.status.message)
        for span in spans
        if span.status.code == span.status.STATUS_CODE_ERROR
    }
    assert all(kind and reason for kind, reason in found), found
    return {kind for kind, _ in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_failure_is_found_by_its_error_status_and_every_outcome_links_to_its_decision(
    station: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector, traced(collector, monkeypatch):
        worker = station.worker({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
        settings = Settings.load(station.settings_file(), trainer={"watch_epochs": 3})
        world = World()
        with Session("run", station.url, settings, restore_dir=tmp_path / "points") as session:
            session.resume(world.surgeon)
            child = worker.child
            child.suspend()
            first = decided(session, measured(world, 60), lambda: child_falls(station, child))
            assert session.apply(first, world.surgeon, failing).result == "refused"
            second = decided(session, measured(world, 61))
            assert session.apply(second, world.surgeon, told(0.9)).result == "applied"
            third = decided(session, measured(world, 90))
            assert session.apply(third, world.surgeon, told(0.9, 0.1)).result == "rolled_back"
        with Session("run", station.url, settings, restore_dir=tmp_path / "points") as session:
            session.resume(World().surgeon)
            (outcome,) = session.watch(91, told(0.1))
            assert outcome.result == "rolled_back"
            session.report(of_nobody(first))
            with Redis.from_url(station.url) as redis:
                redis.xadd(CHECKPOINTS.key(station.partition), {"envelope": b"no envelope"})
            station.wait_for(lambda: len(station.read(DEAD)) == 2, "the dead letters")
        with Session("run", "redis://127.0.0.1:1/0", settings) as away:
            away.publish(checkpoint())
        assert worker.end() == 0
    spans = [span for _, span in collector.spans]
    assert failed(spans, collector) >= FAILURES
    known = {span.span_id: span for span in spans}
    assert [s.name for s in spans if s.parent_span_id and s.parent_span_id not in known] == []
    outcomes = [span for span in spans if span.name == "create outcomes" and span.links]
    assert len(outcomes) == 4, "of all but the one of a decision that was never made"
    for span in outcomes:
        (link,) = span.links
        assert known[link.span_id].name == "create checkpoints"


def failing() -> Evaluation:
    raise RuntimeError("no data")


def measured(world: World, epoch: int) -> CheckpointBundle:
    recorder = Recorder(world.model, example(), architecture=world.surgeon.architecture)
    return recorder.measure(batches(8), epoch=epoch, run_id="run")


def child_falls(station: Station, child: Any) -> None:
    station.wait_for(lambda: station.telemetry("fetched"), "an analysis to begin")
    child.kill()


def decided(
    session: Session, bundle: CheckpointBundle, meanwhile: Any = lambda: None
) -> StructuralPruningDecision:
    with session.checkpoint(bundle.metadata.epoch):
        assert session.publish(bundle)
    meanwhile()
    assert session.wait(240), session.failed
    (decision,) = session.decisions()
    assert decision.approved_for_application, decision.rejection_reason
    return decision


def of_nobody(decision: StructuralPruningDecision) -> PruningOutcome:
    key = replace(decision.key, decision_id="of-nobody")
    return PruningOutcome(
        idempotency_key=str(key), run_id="run", epoch=decision.epoch, result="refused"
    )
