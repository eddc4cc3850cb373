"""Telemetry leaves in its order, behind the work; what cannot leave is counted and holds nobody."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from servers import Server

from elesh.bus import Bus
from elesh.settings import BusSettings
from elesh.worker.telemetry.reports import TelemetryBuffer
from leyline import TelemetryEvent, read_envelope, unwrap
from leyline.streams import TELEMETRY


def event(number: int) -> TelemetryEvent:
    return TelemetryEvent(step="received", worker_id="w1", at=datetime.now(UTC), detail=str(number))


async def told(bus: Bus) -> list[str]:
    messages = [unwrap(read_envelope(entry.envelope)) for entry in await bus.read(TELEMETRY)]
    return [message.detail for message in messages if isinstance(message, TelemetryEvent)]


def test_events_leave_in_order_and_what_is_left_leaves_at_the_end(
    redis_url: str, partition: str
) -> None:
    async def scenario() -> None:
        bus = await Bus.connect(redis_url, BusSettings(partition=partition))
        telemetry_buffer = TelemetryBuffer(bus)
        async with telemetry_buffer.open():
            for number in range(250):
                telemetry_buffer.put(TELEMETRY, event(number), "run", 1)
                if number == 120:
                    await asyncio.sleep(0.01)
        assert await told(bus) == [str(number) for number in range(250)]
        await bus.close()

    asyncio.run(scenario())


def test_what_does_not_fit_or_finds_no_bus_is_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path).start()

    async def scenario() -> None:
        bus = await Bus.connect(server.url, BusSettings())
        telemetry_buffer = TelemetryBuffer(bus)
        for number in range(1005):
            telemetry_buffer.put(TELEMETRY, event(number), "run", 1)
        server.kill()
        async with asyncio.timeout(10), telemetry_buffer.open():
            pass
        await bus.close()

    asyncio.run(scenario())
    lines = [line for line in caplog.records if line.message.startswith("telemetry")]
    missed = [vars(line)["fields"] for line in lines]
    full = [fields for fields in missed if "waited" in fields["reason"]]
    away = [fields for fields in missed if "is the server running?" in fields["reason"]]
    assert [fields["times"] for fields in full] == [5]
    assert away, "a line says that the bus is away; those that follow are counted for a minute"
