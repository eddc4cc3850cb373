"""A worker is killed in the middle of a run: every decision is still one whole, connected trace."""

from __future__ import annotations

from opentelemetry.proto.trace.v1.trace_pb2 import Span
from recorded import Recorded

STORY = {
    "checkpoint", "create checkpoints", "send checkpoints",
    "process checkpoints", "fetch blobs", "analyse channel", "read", "gates", "join",
    "apply decision", "create outcomes", "send outcomes", "process outcomes",
}  # fmt: skip
"""The spans that every decision's trace has."""


def test_every_decision_is_one_connected_tree_from_checkpoint_to_outcome(
    recorded: Recorded,
) -> None:
    figures, collector = recorded.figures, recorded.collector
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
        if "receive redeliveries" in names:  # The first receiver was killed: now it goes in parts.
            assert names >= {"process work", "settle work"}
        else:
            assert names >= {"receive checkpoints", "decide", "settle checkpoints"}
    orphans = [
        span.name
        for spans in traces.values()
        for _, span in spans
        if span.parent_span_id and span.parent_span_id not in {s.span_id for _, s in spans}
    ]
    assert orphans == []


def test_the_redelivery_is_a_span_of_its_own_linked_to_the_creation(recorded: Recorded) -> None:
    spans = [span for _, span in recorded.collector.spans]
    again = [span for span in spans if deliveries(span) > 1]
    assert again
    for span in again:
        (created,) = [s for s in spans if s.span_id == span.links[0].span_id]
        assert created.name == "create checkpoints"
        assert created.trace_id == span.trace_id


def test_spans_follow_the_conventions_for_messaging(recorded: Recorded) -> None:
    collector = recorded.collector
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
