"""Messages and small steps that several tests of the bus need."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from elesh.bus import Bus, Commit, Delivery, Reap
from leyline import AnalysisReport, DeadLetter, IdempotencyKey, Level, Priority, PruningOutcome
from leyline.streams import OUTCOMES, REDELIVERIES, Stream

GROUP = "workers"
STREAMS = (REDELIVERIES, OUTCOMES)
HASH = "0123456789abcdef"
TRACE = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}


def key(epoch: int = 1, level: Level = Level.CHANNEL) -> IdempotencyKey:
    return IdempotencyKey(epoch, HASH, "ck-1", level)


def outcome(epoch: int = 1) -> PruningOutcome:
    return PruningOutcome(
        idempotency_key=str(key(epoch)), run_id="run", epoch=epoch, result="applied"
    )


def result(epoch: int = 1, fingerprint: str = "one", marked: int = 0) -> Commit:
    report = AnalysisReport(
        idempotency_key=str(key(epoch)), analysed=9, marked=marked, error_bound=0.0, confidence=1.0
    )
    return Commit(key(epoch), fingerprint, report, TRACE, "run", epoch)


def dead_letter(delivery: Delivery) -> DeadLetter:
    return DeadLetter(
        stream=delivery.stream.name,
        entry_id=delivery.entry_id,
        error_code="malformed",
        reason="no good",
        deliveries=delivery.deliveries,
        worker_id="w1",
        at=datetime.now(UTC),
        original={name.decode(): value for name, value in delivery.fields.items()},
    )


async def publish(bus: Bus, *epochs: int, priority: Priority = Priority.NORMAL) -> list[str]:
    return [
        await bus.publish(OUTCOMES, outcome(epoch), source="test", carrier=TRACE, priority=priority)
        for epoch in epochs
    ]


async def claim(
    bus: Bus, consumer: str = "w1", count: int = 1, streams: Sequence[Stream] = STREAMS
) -> list[Delivery]:
    return await bus.groups.claim(GROUP, consumer, streams, count=count, block_seconds=0)


async def end_lease(bus: Bus, delivery: Delivery, owner: str = "w1") -> None:
    """Make the lease look as if it had begun a minute ago."""
    stream = delivery.stream.key(bus.partition)
    await bus._client.xclaim(stream, GROUP, owner, 0, [delivery.entry_id], idle=60_000, justid=True)


async def reap(bus: Bus, streams: Sequence[Stream] = STREAMS) -> Reap:
    """A pass of a reaper whose grace is over."""
    seconds, _ = await bus._client.time()
    heartbeat = {"at": 1000 * seconds, "since": 0}
    await bus._client.hset(bus.keys.named("heartbeat"), mapping=heartbeat)
    await bus._client.hset(bus.keys.named("reaper"), "holder", "reaper")
    return await bus.reaper.reap(GROUP, "reaper", streams)


async def take_over(bus: Bus, delivery: Delivery, by: str = "w2", owner: str = "w1") -> Delivery:
    """What another worker gets once the lease has run out."""
    await end_lease(bus, delivery, owner)
    await reap(bus)
    [taken] = await claim(bus, by)
    return taken
