from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from bus_messages import (
    GROUP,
    TRACE,
    claim,
    dead_letter,
    end_lease,
    key,
    outcome,
    publish,
    reap,
    result,
    take_over,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from elesh.bus import Bus, CommitOutcome, EmbeddedServer, read_dead_letter
from elesh.settings import BusSettings
from leyline import UnknownType, read_envelope, unwrap
from leyline.streams import DEAD, DECISIONS, OUTCOMES

COMMITTED, DUPLICATE = CommitOutcome.COMMITTED, CommitOutcome.DUPLICATE
CONFLICT, LOST = CommitOutcome.CONFLICT, CommitOutcome.LOST


async def pending(bus: Bus) -> int:
    return (await bus.pending(GROUP, OUTCOMES)).pending


def test_settling_stores_publishes_and_acknowledges(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        assert await bus.record(key(1)) is None
        assert await bus.commit(GROUP, "w1", delivery, result(1)) is COMMITTED
        [decision] = await bus.read(DECISIONS)
        envelope = read_envelope(decision.envelope)
        assert unwrap(envelope) == result(1).message
        assert decision.carrier == TRACE
        assert envelope.correlation_id == str(key(1))
        assert (envelope.training_run_id, envelope.epoch) == ("run", 1)
        record = await bus.record(key(1))
        assert (record.fingerprint, record.envelope) == ("one", decision.envelope)
        assert await pending(bus) == 0

    with_bus(scenario)


def test_records_live_for_their_time_and_not_for_ever(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        await bus.commit(GROUP, "w1", delivery, result(1))
        assert 0 < await bus._client.ttl(bus.keys.named("record", str(key(1)))) <= 100

    with_bus(scenario, record_ttl_seconds=100)


def test_a_second_commit_of_the_same_key_is_a_duplicate(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 1)
        first, second = await claim(bus, count=2)
        await bus.commit(GROUP, "w1", first, result(1))
        assert await bus.commit(GROUP, "w1", second, result(1, marked=5)) is DUPLICATE
        assert len(await bus.read(DECISIONS)) == 1
        assert await pending(bus) == 0

    with_bus(scenario)


def test_the_same_key_for_other_content_is_a_conflict_and_the_first_stays(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 1)
        first, second = await claim(bus, count=2)
        await bus.commit(GROUP, "w1", first, result(1))
        before = await bus.record(key(1))
        assert await bus.commit(GROUP, "w1", second, result(1, "other")) is CONFLICT
        assert await bus.record(key(1)) == before
        assert len(await bus.read(DECISIONS)) == 1
        assert await pending(bus) == 1
        assert await bus.dead_letter(GROUP, "w1", second, dead_letter(second), {})
        assert await pending(bus) == 0

    with_bus(scenario)


def test_a_worker_that_lost_its_entry_changes_nothing(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        taken = await take_over(bus, delivery)
        assert await bus.commit(GROUP, "w1", delivery, result(1)) is LOST
        assert not await bus.acknowledge(GROUP, "w1", delivery)
        assert not await bus.dead_letter(GROUP, "w1", delivery, dead_letter(delivery), {})
        assert await bus.record(key(1)) is None
        assert await bus.read(DECISIONS) == await bus.read(DEAD) == []
        assert await bus.commit(GROUP, "w2", taken, result(1)) is COMMITTED
        assert await bus.commit(GROUP, "w2", taken, result(1)) is LOST

    with_bus(scenario)


def test_the_latest_decision_of_a_run_is_of_its_newest_epoch_whatever_comes_late(with_bus):
    async def scenario(bus: Bus) -> None:
        for epoch in (5, 3):
            await publish(bus, epoch)
            [delivery] = await claim(bus)
            good = replace(result(epoch, str(epoch)), remember=True)
            await bus.commit(GROUP, "w1", delivery, good)
        level = key(5).level
        newest = await bus.latest("run", level, before=9)
        assert newest is not None
        assert newest.fingerprint == "5"
        assert await bus.latest("run", level, before=5) is None

    with_bus(scenario)


def test_many_workers_on_the_same_checkpoint_make_one_decision(with_bus, redis_url, partition):
    """Published ten times over, served by two connections at once, leases lost in between."""

    async def work(bus: Bus, name: str) -> list[CommitOutcome]:
        verdicts: list[CommitOutcome] = []
        for number in range(20):
            for delivery in await claim(bus, name):
                if number % 3 == 0:
                    await end_lease(bus, delivery, name)
                    await reap(bus)
                verdicts.append(await bus.commit(GROUP, name, delivery, result(1)))
        return verdicts

    async def scenario(bus: Bus) -> None:
        other = await Bus.connect(redis_url, BusSettings(partition=partition))
        await publish(bus, *[1] * 10)
        buses = [bus, other] * 4
        work_of_all = await asyncio.gather(*(work(b, f"w{n}") for n, b in enumerate(buses)))
        verdicts = [verdict for part in work_of_all for verdict in part]
        assert verdicts.count(COMMITTED) == 1
        assert verdicts.count(DUPLICATE) == 9
        assert len(await bus.read(DECISIONS)) == 1
        assert await pending(bus) == 0
        await other.close()

    with_bus(scenario)


@settings(max_examples=15, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["one", "two"])), max_size=8))
def test_settling_follows_its_model(redis_url, plan):
    """Whatever is committed in whatever order: the first content of a key wins, once."""

    async def scenario() -> None:
        bus = await Bus.connect(redis_url, BusSettings(partition="model"))
        await bus._client.flushall()
        await publish(bus, *range(len(plan)))
        stored: dict[int, str] = {}
        seen = set[int]()
        for delivery, (epoch, content) in zip(
            await claim(bus, count=max(1, len(plan))), plan, strict=True
        ):
            known = stored.setdefault(epoch, content)
            expected = CONFLICT if known != content else DUPLICATE if epoch in seen else COMMITTED
            seen.add(epoch)
            before = await pending(bus)
            verdict = await bus.commit(GROUP, "w1", delivery, result(epoch, content))
            assert verdict is expected
            assert await pending(bus) == before - (verdict is not CONFLICT)
        assert len(await bus.read(DECISIONS)) == len(stored)
        await bus.close()

    asyncio.run(scenario())


def test_a_dead_letter_holds_the_original_bytes_and_acknowledges(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus._client.xadd(OUTCOMES.key(bus.partition), {"envelope": b"\xff\x00", "x": b"\x01"})
        [delivery] = await claim(bus)
        assert await bus.dead_letter(GROUP, "w1", delivery, dead_letter(delivery), TRACE)
        [dead] = await bus.read(DEAD)
        assert read_dead_letter(dead).original == {"envelope": b"\xff\x00", "x": b"\x01"}
        assert unwrap(read_envelope(dead.envelope)) == dead_letter(delivery).model_copy(
            update={"at": read_dead_letter(dead).at}
        )
        assert dead.carrier == TRACE
        assert await pending(bus) == 0

    with_bus(scenario)


def test_an_oversized_message_keeps_its_bytes_as_a_dead_letter(with_bus):
    async def scenario(bus: Bus) -> None:
        huge = bytes(9 << 20)
        await bus._client.xadd(OUTCOMES.key(bus.partition), {"envelope": huge})
        [delivery] = await claim(bus)
        assert await bus.dead_letter(GROUP, "w1", delivery, dead_letter(delivery), {})
        [dead] = await bus.read(DEAD)
        assert read_dead_letter(dead).original == {"envelope": huge}
        assert read_dead_letter(dead).reason == "no good"

    with_bus(scenario)


def test_only_dead_letters_are_read_as_such(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus.publish(DEAD, outcome(), source="test")
        [entry] = await bus.read(DEAD)
        with pytest.raises(UnknownType, match="DeadLetter"):
            read_dead_letter(entry)

    with_bus(scenario)


def test_what_was_committed_survives_that_the_server_is_killed(tmp_path):
    async def before(url: str) -> None:
        bus = await Bus.connect(url, BusSettings())
        await bus._client.config_set("appendfsync", "always")
        await publish(bus, 1, 2)
        [first] = await claim(bus)
        assert await bus.commit(GROUP, "w1", first, result(1)) is COMMITTED
        await claim(bus)
        await bus.close()

    async def after(url: str) -> None:
        bus = await Bus.connect(url, BusSettings())
        assert len(await bus.read(DECISIONS)) == 1
        assert (await bus.record(key(1))).fingerprint == "one"
        state = await bus.pending(GROUP, OUTCOMES)
        assert (state.pending, state.consumers) == (1, {"w1": 1})
        await bus.close()

    with EmbeddedServer(tmp_path) as server:
        asyncio.run(before(server.url))
        server._process.kill()
        server._process.wait()
    with EmbeddedServer(tmp_path) as server:
        asyncio.run(after(server.url))


def test_scripts_lost_by_the_server_are_loaded_again(with_bus, redis_url):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        with Redis.from_url(redis_url) as client:
            client.script_flush()
        await publish(bus, 2)
        assert len(await bus.read(OUTCOMES)) == 2

    with_bus(scenario)
