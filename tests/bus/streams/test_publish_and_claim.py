from __future__ import annotations

import asyncio

import pytest
from bus_messages import GROUP, STREAMS, TRACE, claim, outcome, publish, reap, take_over

from elesh.bus import Bus, DeliveryHistory, RunClaimed
from leyline import Malformed, read_envelope, unwrap
from leyline.streams import CHECKPOINTS, OUTCOMES, REQUESTS, TELEMETRY


async def until_blocked(bus: Bus, count: int) -> None:
    while (await bus._client.info("clients"))["blocked_clients"] != count:
        pass


def test_a_message_arrives_as_it_was_published_with_its_trace(with_bus):
    async def scenario(bus: Bus) -> None:
        entry_id = await bus.publish(
            OUTCOMES,
            outcome(3),
            source="trainer",
            carrier={**TRACE, "envelope": "no"},
            run_id="run",
            epoch=3,
            correlation_id="c",
        )
        [delivery] = await claim(bus)
        envelope = read_envelope(delivery.envelope)
        assert delivery.entry_id == entry_id
        assert delivery.stream == OUTCOMES
        assert delivery.deliveries == 1
        assert delivery.carrier == TRACE
        assert unwrap(envelope) == outcome(3)
        assert (envelope.source_subsystem, envelope.training_run_id) == ("trainer", "run")
        assert (envelope.epoch, envelope.correlation_id) == (3, "c")

    with_bus(scenario)


def test_the_same_event_published_twice_is_one_entry(with_bus):
    async def scenario(bus: Bus) -> None:
        send = [
            bus.publish(OUTCOMES, outcome(), source="test", event_id="event-1") for _ in range(20)
        ]
        assert len(set(await asyncio.gather(*send))) == 1
        assert len(await bus.read(OUTCOMES)) == 1

    with_bus(scenario)


def test_an_event_id_counts_within_its_stream_only_and_events_without_one_are_different(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus.publish(OUTCOMES, outcome(), source="test", event_id="event-1")
        await bus.publish(TELEMETRY, outcome(), source="test", event_id="event-1")
        await publish(bus, 1, 1)
        assert len(await bus.read(OUTCOMES)) == 3
        assert len(await bus.read(TELEMETRY)) == 1

    with_bus(scenario)


def test_an_entry_without_an_envelope_is_named_malformed(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus._client.xadd(OUTCOMES.key(bus.partition), {"other": "x"})
        [delivery] = await claim(bus)
        with pytest.raises(Malformed, match=r"outcomes/.*a field named envelope.*other"):
            _ = delivery.envelope
        assert delivery.carrier == {}

    with_bus(scenario)


def test_two_consumers_share_the_entries(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, *range(20))
        taken = await asyncio.gather(*(claim(bus, f"w{n % 2}", 3) for n in range(8)))
        entries = [delivery.entry_id for part in taken for delivery in part]
        assert len(entries) == len(set(entries)) == 20

    with_bus(scenario)


def test_a_claim_never_hands_out_more_than_asked_for_and_serves_earlier_streams_first(with_bus):
    streams = (CHECKPOINTS, REQUESTS, OUTCOMES)

    async def scenario(bus: Bus) -> None:
        for stream in streams:
            for epoch in range(3):
                await bus.publish(stream, outcome(epoch), source="test")
        [first] = await claim(bus, count=1, streams=streams)
        assert first.stream == CHECKPOINTS
        turned = (OUTCOMES, CHECKPOINTS, REQUESTS)
        assert [d.stream for d in await claim(bus, count=4, streams=turned)] == [
            OUTCOMES, OUTCOMES, OUTCOMES, CHECKPOINTS,
        ]  # fmt: skip
        assert len(await claim(bus, count=9, streams=streams)) == 4

    with_bus(scenario)


def test_a_blocked_claim_wakes_for_a_new_entry(with_bus):
    async def scenario(bus: Bus) -> None:
        await claim(bus)
        waiting = asyncio.create_task(
            bus.groups.claim(GROUP, "w1", (CHECKPOINTS, OUTCOMES), count=1, block_seconds=5)
        )
        await bus.publish(OUTCOMES, outcome(), source="test")
        [delivery] = await waiting
        assert delivery.stream == OUTCOMES

    with_bus(scenario)


def test_what_arrives_on_two_streams_at_once_is_given_back_over_the_count(with_bus, monkeypatch):
    async def scenario(bus: Bus) -> None:
        run = bus._scripts.run

        async def empty(name: str, *more: object) -> list[object]:
            """Finds nothing until the waiting read, as if all had come just then."""
            return [] if name == "claim" else await run(name, *more)

        await claim(bus, streams=(CHECKPOINTS, OUTCOMES))
        for stream in (CHECKPOINTS, OUTCOMES):
            await bus.publish(stream, outcome(), source="test")
        monkeypatch.setattr(bus._scripts, "run", empty)
        streams = (CHECKPOINTS, OUTCOMES)
        [first] = await bus.groups.claim(GROUP, "w1", streams, count=1, block_seconds=5)
        monkeypatch.undo()
        [second] = await claim(bus, "w2")
        assert {first.stream.name, second.origin[0]} == {"checkpoints", "outcomes"}
        assert (second.deliveries, second.history) == (1, DeliveryHistory())

    with_bus(scenario)


def test_an_idle_consumer_sends_nothing_but_its_waiting_reads(with_bus):
    async def scenario(bus: Bus) -> None:
        await claim(bus)
        commands = "total_commands_processed"
        before = (await bus._client.info("stats"))[commands]
        for _ in range(3):
            assert not await bus.groups.claim(GROUP, "w1", STREAMS, count=1, block_seconds=0.05)
        sent = (await bus._client.info("stats"))[commands] - before
        # The first claim looks before it waits (a script and what it calls); then only reads.
        assert sent <= 3 + 1 + len(STREAMS) + 1

    with_bus(scenario)


@pytest.mark.parametrize("loss", ["flushall", "destroy"])
def test_a_group_that_vanished_is_made_again_and_reads_from_the_oldest(with_bus, loss):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        if loss == "flushall":
            await bus._client.flushall()
            await publish(bus, 2)
        else:
            await bus._client.xgroup_destroy(OUTCOMES.key(bus.partition), GROUP)
        assert await bus.groups.renew(GROUP, "w1", [delivery]) == [delivery]
        assert (await reap(bus)).taken == ()
        assert not await bus.acknowledge(GROUP, "w1", delivery)
        assert len(await claim(bus, count=9)) == 1

    with_bus(scenario)


@pytest.mark.parametrize("loss", ["flushall", "destroy"])
def test_a_claim_survives_that_its_group_vanishes_while_it_waits(with_bus, loss):
    async def scenario(bus: Bus) -> None:
        await claim(bus)
        waiting = asyncio.create_task(
            bus.groups.claim(GROUP, "w1", STREAMS, count=1, block_seconds=5)
        )
        await until_blocked(bus, 1)
        if loss == "flushall":
            await bus._client.flushall()
        else:
            await bus._client.xgroup_destroy(OUTCOMES.key(bus.partition), GROUP)
        await bus.publish(OUTCOMES, outcome(7), source="test")
        [delivery] = await waiting
        assert unwrap(read_envelope(delivery.envelope)) == outcome(7)

    with_bus(scenario)


def test_a_claim_that_is_cancelled_leaves_the_bus_usable(with_bus):
    async def scenario(bus: Bus) -> None:
        await claim(bus)
        waiting = asyncio.create_task(
            bus.groups.claim(GROUP, "w1", STREAMS, count=1, block_seconds=5)
        )
        await until_blocked(bus, 1)
        waiting.cancel()
        await until_blocked(bus, 0)
        entry_id = (await publish(bus, 1))[0]
        [delivery] = await claim(bus, "w2")
        assert delivery.entry_id == entry_id

    with_bus(scenario)


def test_following_misses_nothing_between_two_calls(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        last_id, entries = await bus.follow(OUTCOMES, last_id="$", block_seconds=0)
        assert entries == []
        expected = await publish(bus, 2, 3)
        last_id, entries = await bus.follow(OUTCOMES, last_id=last_id, block_seconds=5)
        assert [entry.entry_id for entry in entries] == expected
        assert last_id == expected[-1]
        assert entries[0].deliveries == 0
        assert len((await bus.follow(OUTCOMES, last_id="0", block_seconds=0))[1]) == 3

    with_bus(scenario)


def test_following_a_stream_to_come_begins_with_its_first_entry(with_bus):
    async def scenario(bus: Bus) -> None:
        last_id, _ = await bus.follow(OUTCOMES, last_id="$", block_seconds=0)
        await publish(bus, 1)
        assert len((await bus.follow(OUTCOMES, last_id=last_id, block_seconds=0))[1]) == 1

    with_bus(scenario)


def test_reading_takes_a_range_of_ids(with_bus):
    async def scenario(bus: Bus) -> None:
        first, second, _ = await publish(bus, 1, 2, 3)
        assert [d.entry_id for d in await bus.read(OUTCOMES, count=2)] == [first, second]
        assert [d.entry_id for d in await bus.read(OUTCOMES, start=second, end=second)] == [second]
        assert await bus.read(CHECKPOINTS) == []

    with_bus(scenario)


def test_pending_tells_what_is_left_to_do(with_bus):
    async def scenario(bus: Bus) -> None:
        assert (await bus.pending(GROUP, OUTCOMES)).waiting == 0
        await publish(bus, 1, 2, 3)
        assert (await bus.pending(GROUP, OUTCOMES)).waiting == 3
        first, second = await claim(bus, count=2)
        state = await bus.pending(GROUP, OUTCOMES)
        assert (state.pending, state.oldest, state.waiting) == (2, first.entry_id, 1)
        assert state.consumers == {"w1": 2}
        for delivery in (first, second):
            assert await bus.acknowledge(GROUP, "w1", delivery)
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0

    with_bus(scenario)


def test_a_consumer_with_pending_entries_is_not_forgotten(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus, "w1")
        await claim(bus, "w2")
        for consumer in ("w1", "w2"):
            await bus.groups.leave(GROUP, consumer, (OUTCOMES, CHECKPOINTS))
        names = await bus._client.xinfo_consumers(OUTCOMES.key(bus.partition), GROUP)
        assert [consumer["name"] for consumer in names] == [b"w1"]
        assert await take_over(bus, delivery, "w3")

    with_bus(scenario)


def test_a_token_s_publish_is_refused_where_another_has_the_run_and_only_there(with_bus):
    async def scenario(bus: Bus) -> None:
        async def send(token: str, event_id: str) -> str:
            return await bus.publish(
                OUTCOMES, outcome(), source="test", run_id="run", token=token, event_id=event_id
            )

        first = await send("mine", "free")
        await bus.runs.claim("run", "mine", "here:1", 60)
        await send("mine", "ours")
        with pytest.raises(RunClaimed, match="run run is claimed by here:1"):
            await send("other", "theirs")
        assert await send("other", "free") == first, "it is there already"
        assert len(await bus.read(OUTCOMES)) == 2

    with_bus(scenario)
