"""A connected bus in a partition of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from elesh.bus import Bus
from elesh.settings import BreakerSettings, BusSettings

Scenario = Callable[[Bus], Awaitable[Any]]
WithBus = Callable[..., Any]


@pytest.fixture
def with_bus(redis_url: str, partition: str) -> WithBus:
    """Runs a scenario with a bus in the test's own partition, whose streams may be shorter; other
    keywords are BusSettings."""

    def run(
        scenario: Scenario,
        *,
        breaker: BreakerSettings | None = None,
        stream_length: int = Bus.stream_length,
        **settings: Any,
    ) -> Any:
        async def connected() -> Any:
            chosen = BusSettings(partition=partition, **settings)
            bus = await Bus.connect(redis_url, chosen, breaker)
            bus.stream_length = stream_length
            try:
                return await scenario(bus)
            finally:
                await bus.close()

        return asyncio.run(connected())

    return run
