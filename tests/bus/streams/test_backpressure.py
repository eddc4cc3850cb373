"""Streams are bounded: what waits unread sheds lower priorities first, and counts them."""

from __future__ import annotations

import pytest
from bus_messages import GROUP, claim, outcome, publish

from elesh.bus import SHED_FROM, Bus, BusUnavailable, Overloaded
from leyline import Priority
from leyline.streams import OUTCOMES, TELEMETRY, WORKERS

ORDER = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL]


async def fill(bus: Bus, count: int) -> None:
    waiting = (await bus.pending(WORKERS, OUTCOMES)).waiting
    await publish(bus, *range(count - (waiting or 0)), priority=Priority.EMERGENCY)


def test_priorities_are_shed_in_order_as_a_stream_fills_and_emergencies_never(with_bus):
    async def scenario(bus: Bus) -> None:
        for number, priority in enumerate(ORDER):
            await fill(bus, round(SHED_FROM[priority] * 200) - 1)
            await publish(bus, 1, priority=priority)
            with pytest.raises(Overloaded, match=f"outcomes.*priority {priority} is shed"):
                await publish(bus, 1, priority=priority)
            for higher in ORDER[number + 1 :]:
                await publish(bus, priority=higher)
        await fill(bus, 230)
        await publish(bus, 1, priority=Priority.EMERGENCY)
        shed = await bus.shed()
        assert shed == {f"outcomes:{priority}": 1 for priority in ORDER}

    with_bus(scenario, stream_length=200)


def test_what_is_done_makes_room_again(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus.groups.claim(WORKERS, "w1", (OUTCOMES,), count=1, block_seconds=0)
        await fill(bus, 75)
        with pytest.raises(Overloaded):
            await publish(bus, 1)
        held = await bus.groups.claim(WORKERS, "w1", (OUTCOMES,), count=10, block_seconds=0)
        with pytest.raises(Overloaded):
            await publish(bus, 1)
        for delivery in held:
            await bus.acknowledge(WORKERS, "w1", delivery)
        await publish(bus, 1)

    with_bus(scenario, stream_length=100)


def test_the_same_event_is_known_however_full_its_stream_is(with_bus):
    async def scenario(bus: Bus) -> None:
        told = {"source": "test", "event_id": "event-1"}
        entry = await bus.publish(OUTCOMES, outcome(), **told)
        await fill(bus, 99)
        assert await bus.publish(OUTCOMES, outcome(), **told) == entry

    with_bus(scenario, stream_length=100)


def test_streams_that_nobody_works_on_are_trimmed_instead_of_shed(with_bus):
    async def scenario(bus: Bus) -> None:
        for _ in range(300):
            await bus.publish(TELEMETRY, outcome(), source="test", priority=Priority.LOW)
        assert await bus.shed() == {}

    with_bus(scenario, stream_length=100)


def test_shedding_is_a_kind_of_unavailability_so_that_every_publisher_goes_on(with_bus):
    assert issubclass(Overloaded, BusUnavailable)

    async def scenario(bus: Bus) -> None:
        await fill(bus, 75)
        with pytest.raises(BusUnavailable, match="add workers"):
            await publish(bus, 1)
        assert len(await claim(bus, GROUP, count=99)) == 75

    with_bus(scenario, stream_length=100)
