from __future__ import annotations

from bus_messages import GROUP, STREAMS, claim, end_lease, outcome, publish, take_over

from elesh.bus import Bus
from leyline.streams import OUTCOMES, TELEMETRY


def test_only_expired_leases_are_taken_over_and_the_delivery_is_counted(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 2)
        first, second = await claim(bus, count=2)
        assert await bus.reclaim(GROUP, "w2", STREAMS, count=9) == []
        await end_lease(bus, second)
        [taken] = await bus.reclaim(GROUP, "w2", STREAMS, count=9)
        assert (taken.entry_id, taken.fields) == (second.entry_id, second.fields)
        assert taken.deliveries == 2
        assert (await bus.pending(GROUP, first.stream)).consumers == {"w1": 1, "w2": 1}
        await end_lease(bus, taken, "w2")
        [again] = await bus.reclaim(GROUP, "w1", STREAMS, count=9)
        assert again.deliveries == 3

    with_bus(scenario)


def test_a_renewal_is_not_a_delivery_and_keeps_the_entry_from_others(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        for _ in range(3):
            await end_lease(bus, delivery)
            assert await bus.renew(GROUP, "w1", [delivery]) == []
            assert await bus.reclaim(GROUP, "w2", STREAMS, count=1) == []
        await end_lease(bus, delivery)
        [taken] = await bus.reclaim(GROUP, "w2", STREAMS, count=1)
        assert taken.deliveries == 2

    with_bus(scenario)


def test_a_renewal_reports_what_was_lost_and_does_not_steal_it_back(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 2, 3)
        first, second, third = await claim(bus, count=3)
        await take_over(bus, second)
        await bus.acknowledge(GROUP, "w1", third)
        assert await bus.renew(GROUP, "w1", [first, second, third]) == [second, third]
        assert (await bus.pending(GROUP, second.stream)).consumers == {"w1": 1, "w2": 1}
        assert await bus.renew(GROUP, "w1", []) == []

    with_bus(scenario)


def test_reclaiming_goes_on_where_the_last_call_ended(with_bus):
    async def scenario(bus: Bus) -> None:
        ids = await publish(bus, *range(5))
        for delivery in await claim(bus, count=5):
            await end_lease(bus, delivery)
        taken = []
        for _ in range(3):
            for delivery in await bus.reclaim(GROUP, "w2", STREAMS, count=2):
                taken.append(delivery.entry_id)
                # Expired again at once: a scan from the start would find these for ever.
                await end_lease(bus, delivery, "w2")
        assert taken == ids

    with_bus(scenario)


def test_an_entry_that_was_deleted_under_its_owner_is_not_handed_out(with_bus):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        await bus._client.xdel(delivery.stream.key(bus.partition), delivery.entry_id)
        await end_lease(bus, delivery)
        assert await bus.reclaim(GROUP, "w2", STREAMS, count=1) == []

    with_bus(scenario)


def test_trimming_spares_what_a_group_still_needs(with_bus):
    async def scenario(bus: Bus) -> None:
        ids = await publish(bus, *range(700))

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
        await bus.claim("auditors", "a1", STREAMS, count=1, block_seconds=0)
        for delivery in await claim(bus, count=200):
            await bus.acknowledge(GROUP, "w1", delivery)
        assert (await bus.trim())["outcomes"] == 0, "another group has only begun"
        await bus._client.xgroup_destroy(OUTCOMES.key(bus.partition), "auditors")
        await bus.trim()
        assert 100 <= len(await left()) < 300, "what was served stays up to the stream's length"

    with_bus(scenario, stream_length=100)


def test_streams_that_nobody_works_on_are_capped(with_bus):
    async def scenario(bus: Bus) -> None:
        for _ in range(400):
            await bus.publish(TELEMETRY, outcome(), source="test")
        assert (await bus.trim())["telemetry"] > 0
        assert 100 <= len(await bus.read(TELEMETRY)) < 300

    with_bus(scenario, stream_length=100)
