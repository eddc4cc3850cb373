from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from bus_messages import (
    GROUP,
    STREAMS,
    claim,
    end_lease,
    outcome,
    publish,
    reap,
    take_over,
)

from elesh.bus import Bus, Delivery, DeliveryHistory, Reap
from elesh.settings import BusSettings
from leyline import Priority
from leyline.streams import OUTCOMES, REDELIVERIES, TELEMETRY


async def waited(call: Callable[[], Awaitable[Reap]], what: str) -> Reap:
    """The first pass that has ``what``: its time is the server's, so only asking again helps."""
    while True:
        found = await call()
        if getattr(found, what):
            return found
        await asyncio.sleep(found.wait_seconds)


def test_only_expired_leases_are_taken_over_and_the_delivery_is_counted(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 2)
        first, second = await claim(bus, count=2)
        assert (await reap(bus)).taken == ()
        await end_lease(bus, second)
        [taken] = (await reap(bus)).taken
        assert (taken.stream, taken.entry_id, taken.owner) == ("outcomes", second.entry_id, "w1")
        [again] = await claim(bus, "w2", count=9)
        assert (again.envelope, again.carrier) == (second.envelope, second.carrier)
        assert (again.origin, again.deliveries) == (("outcomes", second.entry_id), 2)
        assert (await bus.pending(GROUP, first.stream)).consumers == {"w1": 1}
        third = await take_over(bus, again, "w1", owner="w2")
        assert (third.origin, third.deliveries) == (("outcomes", second.entry_id), 3)
        attempts = third.history.attempts
        assert [(a.cause, a.worker_id) for a in attempts] == [("crash", "w1"), ("crash", "w2")]

    with_bus(scenario)


def test_a_renewal_is_not_a_delivery_and_keeps_the_entry_from_others(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        for _ in range(3):
            await end_lease(bus, delivery)
            assert await bus.groups.renew(GROUP, "w1", [delivery]) == []
            assert (await reap(bus)).taken == ()
        assert (await take_over(bus, delivery)).deliveries == 2

    with_bus(scenario)


def test_a_renewal_reports_what_was_lost_and_does_not_steal_it_back(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 2, 3)
        first, second, third = await claim(bus, count=3)
        await take_over(bus, second)
        await bus.acknowledge(GROUP, "w1", third)
        assert await bus.groups.renew(GROUP, "w1", [first, second, third]) == [second, third]
        assert (await bus.pending(GROUP, OUTCOMES)).consumers == {"w1": 1}
        assert (await bus.pending(GROUP, REDELIVERIES)).consumers == {"w2": 1}
        assert await bus.groups.renew(GROUP, "w1", []) == []

    with_bus(scenario)


def test_a_reaping_pass_goes_on_where_the_last_one_ended(with_bus, monkeypatch):
    """Pages of two: entries deep down have their turn although those before them never expire."""
    monkeypatch.setattr("elesh.bus.streams.consumer_groups._SCAN", 2)

    async def scenario(bus: Bus) -> None:
        await publish(bus, *range(5))
        deliveries = await claim(bus, count=5)
        await end_lease(bus, deliveries[4])
        assert [len((await reap(bus)).taken) for _ in range(3)] == [0, 0, 1]
        await end_lease(bus, deliveries[0])
        [taken] = (await reap(bus)).taken
        assert taken.entry_id == deliveries[0].entry_id, "and begins again at the start"

    with_bus(scenario)


def test_one_pass_moves_a_bounded_number_and_the_next_ones_the_rest(with_bus, monkeypatch):
    monkeypatch.setattr("elesh.bus.streams.consumer_groups._MOVED", 2)

    async def scenario(bus: Bus) -> None:
        ids = await publish(bus, *range(5))
        for delivery in await claim(bus, count=5):
            await end_lease(bus, delivery)
        await reap(bus)
        for _ in range(3):
            await bus.reaper.reap(GROUP, "reaper", STREAMS)
        again = await claim(bus, "w2", count=9)
        assert sorted(delivery.origin[1] for delivery in again) == sorted(ids)
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0

    with_bus(scenario)


def test_the_next_pass_comes_when_the_first_lease_runs_out_and_not_a_period_later(with_bus):
    async def scenario(bus: Bus) -> None:
        assert (await reap(bus)).wait_seconds == bus.reaper.interval
        await publish(bus, 1, 2)
        live, dying = await claim(bus, count=2)
        assert (await reap(bus)).wait_seconds == bus.reaper.interval, "all are fresh"
        left = 0.2
        idle = round(1000 * (bus.settings.lease_seconds - left))
        stream = dying.stream.key(bus.partition)
        await bus._client.xclaim(stream, GROUP, "w1", 0, [dying.entry_id], idle=idle, justid=True)
        found = await reap(bus)
        assert (found.taken, found.wait_seconds <= left + 0.001) == ((), True)
        await bus.groups.renew(GROUP, "w1", [live])
        await asyncio.sleep(found.wait_seconds)
        [taken] = (await reap(bus)).taken
        assert taken.entry_id == dying.entry_id

    with_bus(scenario)


def test_there_is_one_reaper_and_a_dead_one_is_replaced(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        await end_lease(bus, (await claim(bus))[0])
        first = await bus.reaper.reap(GROUP, "s1", STREAMS)
        assert (first.held, first.taken) == (True, ()), "after a silence owners have time to renew"
        refused = await bus.reaper.reap(GROUP, "s2", STREAMS)
        assert not refused.held
        assert refused.wait_seconds <= 0.2
        await bus._client.pexpire(bus.keys.named("reaper"), 1)
        await waited(lambda: bus.reaper.reap(GROUP, "s2", STREAMS), "held")
        await waited(lambda: bus.reaper.reap(GROUP, "s2", STREAMS), "taken")
        assert len(await claim(bus, "w2")) == 1

    with_bus(scenario, lease_seconds=1.0)


@pytest.mark.parametrize(("silence", "taken"), [(200, 1), (2000, 0)])
def test_a_new_reaper_takes_over_at_once_unless_nobody_could_renew(with_bus, silence, taken):
    """The death of a reaper is no silence of the server: others went on calling."""

    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        await end_lease(bus, (await claim(bus))[0])
        seconds, micros = await bus._client.time()
        heartbeat = {"at": 1000 * seconds + micros // 1000 - silence, "since": 0}
        await bus._client.hset(bus.keys.named("heartbeat"), mapping=heartbeat)
        found = await bus.reaper.reap(GROUP, "s2", STREAMS)
        assert (found.held, len(found.taken)) == (True, taken)

    with_bus(scenario, lease_seconds=2.0)


def test_an_entry_that_was_deleted_under_its_owner_is_not_handed_out(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        await bus._client.xdel(delivery.stream.key(bus.partition), delivery.entry_id)
        await end_lease(bus, delivery)
        await reap(bus)
        assert await claim(bus, "w2") == []
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0

    with_bus(scenario)


def test_crashes_exceptions_and_handovers_are_counted_apart(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        delivery = await take_over(bus, delivery, "w1")
        for cause in ("handover", "exception", "handover"):
            assert await bus.groups.requeue(GROUP, "w1", delivery, cause=cause, detail="why")
            [delivery] = await claim(bus)
        history = delivery.history
        assert (history.crashes, history.exceptions, history.handovers) == (1, 1, 2)
        assert delivery.deliveries == 3, "a handover is no delivery"
        assert [a.cause for a in history.attempts] == ["crash", "handover", "exception", "handover"]
        assert {a.detail for a in history.attempts[1:]} == {"why"}
        assert str(history) == "1 by crash, 1 by exception, 2 by handover"

    with_bus(scenario)


def test_only_the_last_attempts_are_told_but_all_are_counted(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        for _ in range(20):
            [delivery] = await claim(bus)
            await bus.groups.requeue(GROUP, "w1", delivery, cause="handover")
        [delivery] = await claim(bus)
        assert delivery.history.handovers == 20
        assert len(delivery.history.attempts) == 16

    with_bus(scenario)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"{}", b'{"attempts": 1}', b'{"crash": "x"}']
)
def test_a_history_that_is_none_of_ours_counts_as_none(with_bus, text):
    async def scenario(bus: Bus) -> None:
        fields = {"envelope": b"x", "history": text, "origin": b"nowhere"}
        await bus._client.xadd(OUTCOMES.key(bus.partition), fields)
        [delivery] = await claim(bus)
        assert (delivery.deliveries, delivery.history) == (1, DeliveryHistory())
        assert delivery.origin == ("outcomes", delivery.entry_id)
        again = await take_over(bus, delivery)
        assert again.deliveries == 2
        assert again.original == {"envelope": b"x"}

    with_bus(scenario)


def test_a_worker_that_lost_its_entry_cannot_give_it_back(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        taken = await take_over(bus, delivery)
        assert not await bus.groups.requeue(GROUP, "w1", delivery, cause="exception")
        assert not await bus.groups.requeue(GROUP, "w1", taken, cause="exception")
        assert await claim(bus, "w3") == []

    with_bus(scenario)


def test_a_delayed_entry_waits_outside_the_streams_until_it_is_due(with_bus):
    async def due(bus: Bus) -> None:
        delayed = bus.keys.named("delayed")
        [member] = await bus._client.zrange(delayed, 0, -1)
        await bus._client.zadd(delayed, {member: 1})

    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        later = {"cause": "exception", "detail": "later", "delay_seconds": 60}
        assert await bus.groups.requeue(GROUP, "w1", delivery, **later)
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0
        assert (await reap(bus)).resumed == 0
        assert await claim(bus) == []
        await due(bus)
        assert (await reap(bus)).resumed == 1
        [again] = await claim(bus)
        assert (again.envelope, again.deliveries) == (delivery.envelope, 2)
        assert (await reap(bus)).resumed == 0, "moved, not copied"

    with_bus(scenario)


def test_a_consumer_that_leaves_hands_over_all_that_it_has(with_bus):
    async def scenario(bus: Bus) -> None:
        ids = await publish(bus, 1, 2, 3)
        first, *_ = await claim(bus, count=3)
        await bus.acknowledge(GROUP, "w1", first)
        assert await bus.groups.requeue_all(GROUP, "w1", STREAMS) == 2
        again = await claim(bus, "w2", count=9)
        assert [delivery.origin[1] for delivery in again] == ids[1:]
        assert [delivery.deliveries for delivery in again] == [1, 1]

    with_bus(scenario)


def test_no_entry_is_lost_or_doubled_while_two_reapers_and_many_workers_race(
    with_bus, redis_url, partition
):
    async def work(bus: Bus, name: str, done: list[str]) -> None:
        for _ in range(12):
            for delivery in await claim(bus, name, 2):
                if len(done) % 3:
                    await end_lease(bus, delivery, name)
                elif await bus.acknowledge(GROUP, name, delivery):
                    done.append(delivery.origin[1])
            await reap(bus)

    async def scenario(bus: Bus) -> None:
        other = await Bus.connect(redis_url, BusSettings(partition=partition))
        ids = await publish(bus, *range(30))
        done: list[str] = []
        await asyncio.gather(*(work(b, f"w{n}", done) for n, b in enumerate([bus, other] * 3)))
        left: list[Delivery] = []
        await bus.groups.requeue_all(GROUP, "w0", STREAMS)
        for n in range(1, 6):
            await bus.groups.requeue_all(GROUP, f"w{n}", STREAMS)
        left += await claim(bus, "last", 99)
        origins = [*done, *(delivery.origin[1] for delivery in left)]
        assert sorted(origins) == sorted(ids)
        await other.close()

    with_bus(scenario)


def test_trimming_spares_what_a_group_still_needs(with_bus):
    async def scenario(bus: Bus) -> None:
        ids = await publish(bus, *range(700), priority=Priority.EMERGENCY)

        async def left() -> list[str]:
            return [delivery.entry_id for delivery in await bus.read(OUTCOMES)]

        assert (await bus.trim())["outcomes"] == 0, "work waits for its group"
        deliveries = await claim(bus, count=500)
        for delivery in deliveries[:250]:
            await bus.acknowledge(GROUP, "w1", delivery)
        removed = (await bus.trim())["outcomes"]
        assert 0 < removed <= 250, "250 are pending, 200 were never delivered"
        assert await left() == ids[removed:]
        for delivery in deliveries[250:]:
            await bus.acknowledge(GROUP, "w1", delivery)
        removed += (await bus.trim())["outcomes"]
        assert 250 < removed <= 500, "200 were never delivered"
        await bus.groups.claim("auditors", "a1", STREAMS, count=1, block_seconds=0)
        for delivery in await claim(bus, count=200):
            await bus.acknowledge(GROUP, "w1", delivery)
        assert (await bus.trim())["outcomes"] == 0, "another group has only begun"
        await bus._client.xgroup_destroy(OUTCOMES.key(bus.partition), "auditors")
        await bus.trim()
        assert 100 <= len(await left()) < 300, "what was served stays up to the stream's length"

    with_bus(scenario, stream_length=100)


def test_consumers_that_fell_silent_are_forgotten_unless_they_hold_something(with_bus, monkeypatch):
    monkeypatch.setattr("elesh.bus.core._SILENCE_MS", 50)

    async def left(bus: Bus) -> set[bytes]:
        await claim(bus, "lively")
        await bus.trim()
        found = await bus._client.xinfo_consumers(OUTCOMES.key(bus.partition), GROUP)
        return {consumer["name"] for consumer in found}

    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        await claim(bus, "holder")
        await claim(bus, "idler")
        deadline = time.monotonic() + 60
        # On a slow machine the lively one, too, may have been silent for long enough.
        while (found := await left(bus)) != {b"holder", b"lively"}:
            assert b"holder" in found
            assert time.monotonic() < deadline
            await asyncio.sleep(0.06)

    with_bus(scenario)


def test_streams_that_nobody_works_on_are_capped(with_bus):
    async def scenario(bus: Bus) -> None:
        for _ in range(400):
            await bus.publish(TELEMETRY, outcome(), source="test")
        assert (await bus.trim())["telemetry"] > 0
        assert 100 <= len(await bus.read(TELEMETRY)) < 300

    with_bus(scenario, stream_length=100)
