"""Clocks of two hosts are never compared: what is shown of a time counts by the server's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bus_messages import publish

from elesh.bus import Bus
from elesh.bus.server.client import ServerClock
from elesh.operate.actions import trip_breaker
from elesh.operate.fleet_status import fleet_status_of
from elesh.settings import BusSettings
from elesh.worker.telemetry.reports import Reports, record_receipts
from leyline import InvalidField, Level, read_envelope, unwrap
from leyline.streams import OPERATIONS, OUTCOMES, WORKERS

AHEAD = timedelta(days=2)
"""Of this host's clock, the server's is."""


@pytest.fixture
def bus_ahead(
    redis_url: str, partition: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Bus], Any]], Any]:
    """Runs a scenario on a bus whose server says that it is two days later."""
    asked = ServerClock._ask

    async def later(clock: ServerClock) -> None:
        await asked(clock)
        assert clock._offset is not None
        clock._offset += AHEAD.total_seconds()

    monkeypatch.setattr(ServerClock, "_ask", later)

    def run(scenario: Callable[[Bus], Any]) -> Any:
        async def connected() -> Any:
            bus = await Bus.connect(redis_url, BusSettings(partition=partition))
            try:
                return await scenario(bus)
            finally:
                await bus.close()

        return asyncio.run(connected())

    return run


def is_there(at: datetime) -> bool:
    """Whether a time is the server's."""
    return abs(at - datetime.now(UTC) - AHEAD) < timedelta(hours=1)


def test_what_workers_and_operators_say_is_dated_by_the_server_s_clock(bus_ahead: Any) -> None:
    async def scenario(bus: Bus) -> None:
        reports = Reports(bus, "w1")
        reports.status.began("60:ab:ck:channel", ("outcomes", "1-0"))
        state = reports.status.state()
        assert is_there(datetime.fromtimestamp(state.started_at, UTC))
        assert is_there(datetime.fromtimestamp(state.since, UTC))
        await publish(bus, 1)
        [delivery] = await bus.groups.claim(WORKERS, "w1", [OUTCOMES], count=1, block_seconds=0)
        letter = reports.dead_letter(delivery, InvalidField("epoch", "a number", "none"), None)
        assert is_there(letter.at)
        await trip_breaker(bus, "run", Level.CHANNEL, "somebody", "to try")
        [entry] = await bus.read(OPERATIONS)
        action: Any = unwrap(read_envelope(entry.envelope))
        assert is_there(action.at)
        assert is_there((await fleet_status_of(bus)).at)

    bus_ahead(scenario)


def test_the_time_that_an_entry_waited_is_the_server_s(
    bus_ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[dict[str, Any]] = []

    class Recorded:
        def __init__(self, _: str, **options: Any) -> None:
            spans.append(options)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("elesh.worker.telemetry.reports.span", Recorded)

    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await bus.groups.claim(WORKERS, "w1", [OUTCOMES], count=1, block_seconds=0)
        published = datetime.fromtimestamp(int(delivery.entry_id.partition("-")[0]) / 1000, UTC)
        begun = round(datetime.now(UTC).timestamp() * 1e9)
        record_receipts([delivery], begun, published + timedelta(seconds=3))
        assert spans[0]["attributes"]["elesh.queued_seconds"] == pytest.approx(3.0)
        # The span begins where it was asked for: it was there before.
        assert spans[0]["start"] == begun

    bus_ahead(scenario)
