"""Fan-out: planned, stored and joined once each, whatever is delivered twice or dies between."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from bus_messages import (
    GROUP,
    STREAMS,
    TRACE,
    claim,
    dead_letter,
    end_lease,
    key,
    publish,
    reap,
    result,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from elesh.bus import Bus, CommitOutcome, Delivery, Plan, Planned, Stored
from elesh.settings import BusSettings
from leyline import AnalysisItem, ItemResult, JoinItem, Level, Message, read_envelope, unwrap
from leyline.streams import DEAD, OUTCOMES, REDELIVERIES, WORK

KEY = str(key(1, Level.JOINT))
ITEMS = [AnalysisItem(plan=KEY, level=level) for level in (Level.CHANNEL, Level.HEAD, Level.LAYER)]
BOTH = (REDELIVERIES, WORK)
PLAN = Plan(KEY, "one", b"", TRACE, tuple(item.name for item in ITEMS), "outcomes/1-0")


def message(delivery: Delivery) -> Message:
    return unwrap(read_envelope(delivery.envelope))


async def planned(
    bus: Bus, delivery: Delivery, fingerprint: str = "one", window: float = 60, by: str = "w1"
) -> Planned:
    plan = replace(PLAN, fingerprint=fingerprint, envelope=delivery.envelope)
    return await bus.plans.plan(GROUP, by, delivery, plan, ITEMS, window_seconds=window)


async def store(bus: Bus, delivery: Delivery, by: str = "w1", text: str = "x") -> Stored:
    item = message(delivery)
    assert isinstance(item, AnalysisItem)
    return await bus.plans.store(GROUP, by, delivery, PLAN, item, ItemResult(failed=text))


async def begun(bus: Bus) -> list[Delivery]:
    """A planned checkpoint; the deliveries of its parts."""
    await publish(bus, 1)
    [delivery] = await claim(bus)
    assert await planned(bus, delivery) == Planned.PLANNED
    return await claim(bus, count=9, streams=BOTH)


def test_a_checkpoint_that_was_decided_meanwhile_is_not_planned_again(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        await publish(bus, 2)
        first, late = await claim(bus, count=2)
        committed = replace(result(1, "one"), key=key(1, Level.JOINT))
        assert await bus.commit(GROUP, "w1", first, committed) is CommitOutcome.COMMITTED
        assert await planned(bus, late, "other") == Planned.CONFLICT
        assert await planned(bus, late) == Planned.DUPLICATE
        assert await claim(bus, count=9, streams=BOTH) == []
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0

    with_bus(scenario)


def test_planning_publishes_the_parts_with_the_trace_and_acknowledges_the_checkpoint(with_bus):
    async def scenario(bus: Bus) -> None:
        parts = await begun(bus)
        assert [message(part) for part in parts] == ITEMS
        assert [part.carrier for part in parts] == [TRACE] * 3
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0
        plan = await bus.plans.load(KEY)
        assert (plan.fingerprint, plan.items) == ("one", ("channel", "head", "layer"))
        assert (plan.carrier, plan.origin) == (TRACE, "outcomes/1-0")

    with_bus(scenario)


def test_a_checkpoint_that_is_planned_twice_has_its_parts_once(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 1, 1)
        first, second, third = await claim(bus, count=3)
        assert await planned(bus, first) == Planned.PLANNED
        assert await planned(bus, second) == Planned.DUPLICATE
        assert await planned(bus, third, "other") == Planned.CONFLICT
        assert await planned(bus, first) == Planned.LOST
        assert len(await bus.read(WORK)) == 3
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 1, "the conflict is its owner's"

    with_bus(scenario)


def test_a_worker_that_lost_the_checkpoint_plans_nothing(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        await end_lease(bus, delivery)
        await reap(bus)
        assert await planned(bus, delivery) == Planned.LOST
        assert await bus.plans.load(KEY) is None
        assert await bus.read(WORK) == []

    with_bus(scenario)


def test_the_part_that_completes_the_set_queues_the_one_join(with_bus):
    async def scenario(bus: Bus) -> None:
        first, second, third = await begun(bus)
        assert await store(bus, third) == Stored.STORED
        assert await store(bus, first) == Stored.STORED
        assert await claim(bus, streams=BOTH) == []
        assert await store(bus, second) == Stored.COMPLETED
        [join] = await claim(bus, count=9, streams=BOTH)
        assert message(join) == JoinItem(plan=KEY)
        assert join.carrier == TRACE
        assert sorted(await bus.plans.results(PLAN)) == ["channel", "head", "layer"]
        assert await bus._client.zcard(bus.keys.named("deadlines")) == 0

    with_bus(scenario)


def test_a_part_has_one_result_the_first_one(with_bus):
    async def scenario(bus: Bus) -> None:
        part, *_ = await begun(bus)
        await end_lease(bus, part)
        await reap(bus, (WORK,))
        [again] = await claim(bus, "w2", streams=BOTH)
        assert await store(bus, part, text="late") == Stored.LOST
        assert await bus.plans.results(PLAN) == {}
        assert await store(bus, again, "w2", "first") == Stored.STORED
        item = message(again)
        await bus._client.xadd(WORK.key(bus.partition), {"envelope": again.envelope})
        [copy] = await claim(bus, streams=BOTH)
        assert message(copy) == item
        assert await store(bus, copy, text="second") == Stored.DUPLICATE
        assert (await bus.plans.results(PLAN))["channel"].failed == "first"

    with_bus(scenario)


def test_the_deadline_queues_the_join_with_what_is_there(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        await planned(bus, delivery, window=0.001)
        first, second, third = await claim(bus, count=3, streams=BOTH)
        assert await store(bus, first) == Stored.STORED
        await bus._client.zadd(bus.keys.named("deadlines"), {KEY: 1})
        assert (await reap(bus)).overdue == (KEY,)
        assert (await reap(bus)).overdue == ()
        [join] = await claim(bus, count=9, streams=BOTH)
        assert message(join) == JoinItem(plan=KEY)
        for late in (second, third):
            assert await store(bus, late) == Stored.STORED
        assert await claim(bus, count=9, streams=BOTH) == [], "and there is no second join"

    with_bus(scenario)


def test_what_a_plan_leaves_goes_with_its_decision(with_bus):
    async def scenario(bus: Bus) -> None:
        parts = await begun(bus)
        for part in parts[:2]:
            await store(bus, part)
        committed = await bus.commit(GROUP, "w1", parts[2], result(1), bus.plans.served_keys(KEY))
        assert committed is CommitOutcome.COMMITTED
        assert await bus.plans.load(KEY) is None
        assert await bus.plans.results(PLAN) == {}

    with_bus(scenario)


def test_a_part_without_its_plan_stays_with_its_owner(with_bus):
    async def scenario(bus: Bus) -> None:
        part, *_ = await begun(bus)
        await bus._client.delete(*bus.plans.served_keys(KEY))
        assert await store(bus, part) == Stored.GONE
        assert await bus.dead_letter(GROUP, "w1", part, dead_letter(part), {})
        assert len(await bus.read(DEAD)) == 1

    with_bus(scenario)


def test_plans_live_for_their_time_and_not_for_ever(with_bus):
    async def scenario(bus: Bus) -> None:
        part, *_ = await begun(bus)
        await store(bus, part)
        lives = [await bus._client.ttl(name) for name in bus.plans.served_keys(KEY)]
        assert all(0 < seconds <= 100 for seconds in lives)

    with_bus(scenario, record_ttl_seconds=100)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=14))
def test_whatever_is_lost_or_delivered_again_there_is_one_join(redis_url, steps):
    """Steps store a part's result or lose its lease, in any order; then all is finished."""

    async def scenario() -> None:
        bus = await Bus.connect(redis_url, BusSettings(partition="plans"))
        await bus._client.flushall()
        held = {message(part).name: part for part in await begun(bus)}
        joins = 0
        done: set[str] = set()
        for number, lose in [*steps, (0, False), (1, False), (2, False)]:
            name = ITEMS[number].name
            if name in done:
                continue
            if lose:
                await end_lease(bus, held[name])
                await reap(bus, BOTH)
                [held[name]] = await claim(bus, streams=BOTH)
            else:
                joins += await store(bus, held[name]) == Stored.COMPLETED
                done.add(name)
        assert joins == 1
        [join] = await claim(bus, count=9, streams=BOTH)
        assert message(join) == JoinItem(plan=KEY)
        await bus.close()

    asyncio.run(scenario())


def test_many_workers_storing_at_once_queue_one_join(with_bus, redis_url, partition):
    async def scenario(bus: Bus) -> None:
        others = [await Bus.connect(redis_url, BusSettings(partition=partition)) for _ in ITEMS]
        parts = await begun(bus)
        stored = await asyncio.gather(
            *(store(other, part) for other, part in zip(others, parts, strict=True))
        )
        assert sorted(stored) == ["completed", "stored", "stored"]
        assert len(await claim(bus, count=9, streams=(*STREAMS, WORK))) == 1
        for other in others:
            await other.close()

    with_bus(scenario)
