"""A worker's part of a trace: every level and their join, though its child is killed meanwhile."""

from __future__ import annotations

from dataclasses import replace

import layer_networks
import pytest
from collector import Collector, collecting
from redis import Redis
from station import Station, ready

from elesh.bus import Bus
from leyline import Level
from leyline.streams import CHECKPOINTS, DEAD

IN_PARTS = {"supervisor.AT_ONCE_BYTES": 0}
TRACE, CREATED = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BOTH = replace(layer_networks.network(), levels=(Level.CHANNEL, Level.LAYER))


def publish_traced(station: Station) -> None:
    async def publish(bus: Bus) -> str:
        carrier = {"traceparent": f"00-{TRACE}-{CREATED}-01"}
        message = await ready(bus, BOTH)
        return await bus.publish(CHECKPOINTS, message, source="t", carrier=carrier, run_id="run")

    station.on_bus(publish)


def names_of(collector: Collector) -> list[str]:
    return [span.name for _, span in collector.spans]


def test_levels_and_join_are_one_tree_under_the_trainer_s_context(station: Station) -> None:
    with collecting() as collector:
        worker = station.worker({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}, IN_PARTS)
        child = worker.child
        child.suspend()
        publish_traced(station)
        station.wait_for(lambda: station.telemetry("fetched"), "an analysis to begin")
        child.kill()
        (decision,) = station.wait_decisions(1)
        assert worker.end() == 0
    spans = [span for _, span in collector.spans if span.trace_id.hex() == TRACE]
    known = {span.span_id.hex() for span in spans} | {CREATED}
    assert all(span.parent_span_id.hex() in known for span in spans)
    assert len(spans) == len(collector.spans)  # nothing is traced apart from it
    for name in ("process checkpoints", "process work", "analyse channel", "analyse layer", "join"):
        assert name in names_of(collector)
    # What the killed child's supervisor saw of it has arrived, too.
    fell = {span.name for span in spans if any(event.name == "fallback" for event in span.events)}
    assert fell & {"analyse channel", "analyse layer"}
    assert {"read", "score", "gates"} <= set(names_of(collector))
    assert decision.key.level is Level.JOINT
    levels = {span.name: collector.attribute(span, "elesh.levels") for span in spans}
    assert levels["analyse channel"] == "channel"
    assert levels["process checkpoints"] == levels["join"] == "channel,layer"
    spoke = [span for span in spans if span.name.partition(" ")[0] in ("receive", "process")]
    assert all(collector.attribute(span, "server.address") for span in spoke)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_sampled_leaves_no_span(station: Station) -> None:
    with collecting() as collector:
        worker = station.worker(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}, observe={"sample_ratio": 0.0}
        )
        station.publish(BOTH)
        station.wait_decisions(1)
        assert worker.end() == 0
    assert collector.spans == []


@pytest.mark.slow
def test_an_entry_that_becomes_a_dead_letter_is_found_by_its_span_s_error(station: Station) -> None:
    with collecting() as collector:
        worker = station.worker({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
        client = Redis.from_url(station.url)
        client.xadd(CHECKPOINTS.key(station.partition), {"envelope": b"no envelope"})
        station.wait_for(lambda: station.read(DEAD), "the dead letter")
        assert worker.end() == 0
    (span,) = [span for _, span in collector.spans if span.name == "process checkpoints"]
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert collector.attribute(span, "error.type") == "malformed"
