from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elesh.bus import Bus
from elesh.settings import BreakerSettings, BusSettings
from leyline import Level

CHANNEL, HEAD = Level.CHANNEL, Level.HEAD


async def fail(bus: Bus, times: int = 3, reason: str = "boom") -> None:
    for _ in range(times):
        await bus.breakers.failure("run", CHANNEL, reason)


async def rewind(bus: Bus, field: str, seconds: float = 61) -> None:
    """Make it look as if the breaker had opened, or its probe had begun, that long ago."""
    stored, circuit = await bus.breakers._read("run", CHANNEL)
    earlier = replace(circuit, **{field: getattr(circuit, field) - int(seconds * 1000)})
    assert await bus.breakers._write("run", CHANNEL, stored, earlier)


async def half_open(bus: Bus) -> None:
    await fail(bus)
    await rewind(bus, "opened_at")
    view = await bus.breakers.admit("run", CHANNEL)
    assert (view.state, view.admitted, view.probe) == ("half_open", True, True)


def test_the_third_consecutive_failure_opens(with_bus):
    async def scenario(bus: Bus) -> None:
        breakers = bus.breakers
        assert await breakers.failure("run", CHANNEL, "one") is None
        assert await breakers.failure("run", CHANNEL, "two") is None
        assert (await breakers.admit("run", CHANNEL)).admitted
        change = await breakers.failure("run", CHANNEL, "three")
        assert (change.before, change.after, change.failures) == ("closed", "open", 3)
        assert (change.run_id, change.level, change.reason) == ("run", CHANNEL, "three")
        view = await breakers.admit("run", CHANNEL)
        assert (view.state, view.admitted, view.probe) == ("open", False, False)
        assert (view.failures, view.reason) == (3, "three")
        assert view.opened_at == change.at

    with_bus(scenario)


def test_runs_and_levels_have_breakers_of_their_own(with_bus):
    async def scenario(bus: Bus) -> None:
        await fail(bus)
        assert not (await bus.breakers.admit("run", CHANNEL)).admitted
        assert (await bus.breakers.admit("run", HEAD)).admitted
        assert (await bus.breakers.admit("other", CHANNEL)).admitted

    with_bus(scenario)


def test_a_success_ends_the_row_of_failures(with_bus):
    async def scenario(bus: Bus) -> None:
        await fail(bus, 2)
        assert await bus.breakers.success("run", CHANNEL) is None
        await fail(bus, 2)
        assert (await bus.breakers.view("run", CHANNEL)).state == "closed"

    with_bus(scenario)


def test_a_failure_delivered_again_counts_once(with_bus):
    async def scenario(bus: Bus) -> None:
        for _ in range(5):
            await bus.breakers.failure("run", CHANNEL, "boom", token="1:abc")
        assert (await bus.breakers.view("run", CHANNEL)).failures == 1
        await bus.breakers.failure("run", CHANNEL, "boom", token="2:abc")
        assert await bus.breakers.failure("run", CHANNEL, "boom", token="3:abc")

    with_bus(scenario)


def test_concurrent_failures_open_it_once(with_bus):
    async def scenario(bus: Bus) -> None:
        changes = await asyncio.gather(
            *(bus.breakers.failure("run", CHANNEL, f"{n}") for n in range(20))
        )
        assert sum(change is not None for change in changes) == 1
        assert (await bus.breakers.view("run", CHANNEL)).failures == 20

    with_bus(scenario)


def test_an_open_breaker_stays_so_for_its_recovery_time_whatever_old_work_says(with_bus):
    async def scenario(bus: Bus) -> None:
        await fail(bus)
        await rewind(bus, "opened_at", 20)
        assert not (await bus.breakers.admit("run", CHANNEL)).admitted
        assert await bus.breakers.success("run", CHANNEL) is None
        assert (await bus.breakers.view("run", CHANNEL)).state == "open"

    with_bus(scenario)


def test_one_of_twenty_gets_the_probe(with_bus):
    async def scenario(bus: Bus) -> None:
        await fail(bus)
        await rewind(bus, "opened_at")
        views = await asyncio.gather(*(bus.breakers.admit("run", CHANNEL) for _ in range(20)))
        assert sum(view.admitted for view in views) == 1
        assert sum(view.probe for view in views) == 1
        assert {view.state for view in views} == {"half_open"}

    with_bus(scenario)


def test_a_probe_that_succeeds_closes(with_bus):
    async def scenario(bus: Bus) -> None:
        await half_open(bus)
        change = await bus.breakers.success("run", CHANNEL)
        assert (change.before, change.after, change.failures) == ("half_open", "closed", 0)
        assert (await bus.breakers.admit("run", CHANNEL)).admitted
        assert await bus.breakers.show() == []

    with_bus(scenario)


@pytest.mark.parametrize("times", [1, 2])
def test_a_probe_that_fails_opens_again_even_if_its_failure_is_known(with_bus, times):
    async def scenario(bus: Bus) -> None:
        for _ in range(times):
            await half_open(bus)
            change = await bus.breakers.failure("run", CHANNEL, "again", token="probe")
            assert (change.before, change.after) == ("half_open", "open")
            assert not (await bus.breakers.admit("run", CHANNEL)).admitted

    with_bus(scenario)


def test_a_prober_that_died_is_replaced_once_when_its_lease_is_over(with_bus):
    async def scenario(bus: Bus) -> None:
        await half_open(bus)
        assert not (await bus.breakers.admit("run", CHANNEL)).admitted
        await rewind(bus, "probe_until")
        views = await asyncio.gather(*(bus.breakers.admit("run", CHANNEL) for _ in range(20)))
        assert sum(view.probe for view in views) == 1

    with_bus(scenario)


def test_a_probe_that_led_to_no_decision_is_had_by_who_asks_next(with_bus):
    async def scenario(bus: Bus) -> None:
        await half_open(bus)
        assert not (await bus.breakers.admit("run", CHANNEL)).admitted
        await bus.breakers.give_back("run", CHANNEL)
        views = await asyncio.gather(*(bus.breakers.admit("run", CHANNEL) for _ in range(20)))
        assert sum(view.probe for view in views) == 1

    with_bus(scenario)


def test_looking_admits_nobody(with_bus):
    async def scenario(bus: Bus) -> None:
        await fail(bus)
        await rewind(bus, "opened_at")
        view = await bus.breakers.view("run", CHANNEL)
        assert (view.state, view.admitted) == ("open", False)
        assert (await bus.breakers.admit("run", CHANNEL)).probe

    with_bus(scenario)


def test_operators_close_and_open_it_by_hand(with_bus):
    async def scenario(bus: Bus) -> None:
        change = await bus.breakers.trip("run", CHANNEL, "maintenance")
        assert (change.after, change.reason) == ("open", "maintenance")
        assert await bus.breakers.trip("run", CHANNEL, "maintenance") is None
        [shown] = await bus.breakers.show()
        assert (shown.run_id, shown.level, shown.state) == ("run", CHANNEL, "open")
        change = await bus.breakers.reset("run", CHANNEL)
        assert (change.before, change.after) == ("open", "closed")
        assert await bus.breakers.reset("run", CHANNEL) is None
        assert await bus.breakers.show() == []

    with_bus(scenario)


def test_show_lists_failures_too_and_forgets_what_expired(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus.breakers.failure("b", HEAD, "x")
        await bus.breakers.trip("a", CHANNEL, "y")
        await bus.breakers.trip("gone", CHANNEL, "z")
        await bus._client.delete(f"elesh:{{{bus.partition}}}:breaker:gone:channel")
        shown = await bus.breakers.show()
        assert [(v.run_id, v.state, v.failures) for v in shown] == [
            ("a", "open", 0),
            ("b", "closed", 1),
        ]
        assert await bus._client.scard(f"elesh:{{{bus.partition}}}:breakers") == 2

    with_bus(scenario)


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(1, 4),
    steps=st.lists(st.sampled_from(["failure", "success", "reset", "trip", "admit"]), max_size=12),
)
def test_a_breaker_follows_its_model(redis_url, limit, steps):
    """Before its recovery time a breaker is open after ``limit`` failures in a row, or by hand."""

    async def scenario() -> None:
        breaker = BreakerSettings(failures=limit, recovery_seconds=3600)
        bus = await Bus.connect(redis_url, BusSettings(partition="model"), breaker)
        await bus.breakers.reset("run", CHANNEL)
        failures, is_open = 0, False
        for step in steps:
            arguments = ("why",) if step in ("failure", "trip") else ()
            answer = await getattr(bus.breakers, step)("run", CHANNEL, *arguments)
            if step == "failure":
                failures += 1
                is_open = is_open or failures >= limit
            elif step == "trip":
                is_open = True
            elif step == "reset" or (step == "success" and not is_open):
                failures, is_open = 0, False
            if step == "admit":
                assert answer.admitted is not is_open
            view = await bus.breakers.view("run", CHANNEL)
            assert (view.state, view.failures) == ("open" if is_open else "closed", failures)
        await bus.close()

    asyncio.run(scenario())


def test_an_operator_s_reason_stays_through_later_failures_until_it_closes(with_bus):
    async def scenario(bus: Bus) -> None:
        breakers = bus.breakers
        await breakers.trip("run", CHANNEL, "looks wrong to me")
        await rewind(bus, "opened_at")
        assert (await breakers.admit("run", CHANNEL)).probe
        change = await breakers.failure("run", CHANNEL, "boom")
        assert change is not None
        assert change.after == "open"
        reason = (await breakers.view("run", CHANNEL)).reason
        assert reason == "looks wrong to me; a failure since: boom"
        assert change.reason == "boom", "what happened now"
        told = await breakers.reset("run", CHANNEL, "it was the data")
        assert told is not None
        assert told.reason == "reset by an operator: it was the data"
        await fail(bus)
        assert (await breakers.view("run", CHANNEL)).reason == "boom"

    with_bus(scenario)
