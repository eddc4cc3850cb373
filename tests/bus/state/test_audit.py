"""The audit log on the bus: one chain under many writers, everything in it exactly once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from contracts import examples
from elesh.bus import Bus, Delivery
from elesh.observe import AuditFile, verify
from elesh.operate.actions import reset_breaker, trip_breaker
from elesh.operate.events import format_event
from elesh.settings import BusSettings
from elesh.worker.telemetry.auditor import audit_links, extend_file, write_audit
from leyline import Level, Priority, PruningOutcome, encode, wrap
from leyline.streams import AUDIT, DEAD, DECISIONS, OUTCOMES, TELEMETRY


async def outcomes(bus: Bus, count: int) -> None:
    message = examples.MESSAGES["PruningOutcome"]
    for _ in range(count):
        # Never shed, however much waits.
        await bus.publish(OUTCOMES, message, source="kasmina", priority=Priority.EMERGENCY)


async def faults(bus: Bus) -> list[str]:
    head = await bus.audit.head()
    links = [link async for link in audit_links(bus)]
    return [str(fault) for fault in verify(links, number=head.number, digest=head.digest)]


def test_many_writers_make_one_chain_with_each_message_once(with_bus, redis_url):
    async def scenario(bus: Bus) -> None:
        settings = BusSettings(partition=bus.partition)
        others = [await Bus.connect(redis_url, settings) for _ in range(5)]

        async def write(writer: Bus) -> int:
            written = 0
            for _ in range(20):
                await outcomes(writer, 2)
                written += await write_audit(writer)
            return written

        written = await asyncio.gather(*map(write, others))
        written.append(await write_audit(bus))
        assert sum(written) == 5 * 20 * 2
        assert (await bus.audit.head()).number == 200
        sources = [link.entry.event.source async for link in audit_links(bus) if link.entry]
        assert len(set(sources)) == 200
        assert await faults(bus) == []
        for each in others:
            await each.close()

    with_bus(scenario)


def test_every_kind_of_event_is_told_with_its_reason_gates_and_digest(with_bus):
    async def scenario(bus: Bus) -> None:
        decision = examples.MESSAGES["StructuralPruningDecision"]
        entry = await bus.publish(DECISIONS, decision, source="elesh")
        await outcomes(bus, 1)
        await bus.publish(TELEMETRY, examples.MESSAGES["TelemetryEvent"], source="elesh")
        await trip_breaker(bus, "digits-7", Level.CHANNEL, "jo@station", "looks wrong")
        await reset_breaker(bus, "digits-7", Level.CHANNEL, "jo@station")
        await write_audit(bus)
        events = [link.entry.event async for link in audit_links(bus) if link.entry]
        told = sorted((event.kind, event.action) for event in events)
        assert told == [
            ("breaker", "closed"),
            ("breaker", "open"),
            ("decision", "approved"),
            ("operator", "breaker_reset"),
            ("operator", "breaker_trip"),
            ("outcome", "applied"),
        ]
        made = next(event for event in events if event.kind == "decision")
        assert made.gates == decision.safety.gates
        assert made.fallbacks == decision.fallbacks
        assert made.source == f"decisions/{entry}"
        assert len(made.digest or "") == 64
        trip = next(event for event in events if event.action == "breaker_trip")
        assert (trip.actor, trip.subject) == ("jo@station", "digits-7:channel")
        assert trip.reason == "looks wrong; closed to open"

    with_bus(scenario)


def test_an_entry_taken_from_the_stream_is_missed_at_its_place(with_bus):
    async def scenario(bus: Bus) -> None:
        await outcomes(bus, 4)
        await write_audit(bus)
        key = AUDIT.key(bus.partition)
        entries = await bus.read(AUDIT)
        await bus._client.xdel(key, entries[1].entry_id)
        assert await faults(bus) == [
            f"audit/{entries[2].entry_id}: entry 3 where entry 2 should be"
        ]
        await bus._client.xdel(key, entries[3].entry_id)
        assert (await faults(bus))[1].endswith("entry 4 is missing: the chain ends at entry 4")

    with_bus(scenario)


def test_trimming_leaves_the_audit_log_alone(with_bus):
    async def scenario(bus: Bus) -> None:
        await outcomes(bus, 450)
        await write_audit(bus)
        await bus.trim()
        assert len(await bus.read(AUDIT)) == 450

    with_bus(scenario, stream_length=100)


def test_the_file_follows_the_log_and_refuses_another_one(with_bus, tmp_path: Path):
    async def scenario(bus: Bus) -> None:
        file = AuditFile(tmp_path / "audit.jsonl")
        await outcomes(bus, 3)
        await write_audit(bus, file.path)
        await outcomes(bus, 2)
        await write_audit(bus)
        assert [entry.number for entry in await extend_file(bus, file)] == [4, 5]
        head = await bus.audit.head()
        assert verify(file.links(), number=head.number, digest=head.digest) == []
        await bus._client.flushall()
        await outcomes(bus, 1)
        await write_audit(bus)
        with pytest.raises(ValueError, match="ends with entry 5, the log on the bus with entry 1"):
            await extend_file(bus, file)

    with_bus(scenario)


def test_an_entry_names_what_happened_and_when(with_bus):
    async def scenario(bus: Bus) -> None:
        message = examples.MESSAGES["PruningOutcome"]
        assert isinstance(message, PruningOutcome)
        before = datetime.now(UTC)
        await outcomes(bus, 1)
        await write_audit(bus)
        [event] = [link.entry.event async for link in audit_links(bus) if link.entry]
        assert event.subject == message.idempotency_key
        assert event.actor == f"trainer of {message.run_id}"
        assert abs((event.at - before).total_seconds()) < 30
        assert event.figures["accuracy_masked"] == message.accuracy_masked

    with_bus(scenario)


def test_an_entry_whose_id_is_beyond_all_calendars_stops_neither_audit_nor_listing(with_bus):
    async def scenario(bus: Bus) -> None:
        framed = encode(wrap(examples.MESSAGES["PruningOutcome"], source="kasmina"))
        key = bus.keys.stream(OUTCOMES)
        await bus._client.xadd(key, {"envelope": framed}, id="18446744073709551614-7")
        assert await write_audit(bus) == 1
        (delivery,) = await bus.read(OUTCOMES)
        assert format_event(delivery).at.year == 9999
        assert await faults(bus) == []

    with_bus(scenario)


@pytest.mark.parametrize("named", ["x\x1b]0;owned\x07", "9" * 400, "\u0663:x", ""])
def test_a_dead_letter_of_any_key_can_be_listed(named):
    letter = examples.MESSAGES["DeadLetter"].model_copy(update={"idempotency_key": named})
    framed = encode(wrap(letter, source="x"))
    event = format_event(Delivery(DEAD, "1-1", {b"envelope": framed}, 1))
    assert (event.epoch, event.key) == (None, named)
