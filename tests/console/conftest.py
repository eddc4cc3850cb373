"""A console of the test's own, and a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from browser import Browser, browsing
from console_server import TOKEN, Site, serving_console

from elesh.bus import Bus
from elesh.settings import BusSettings, ConsoleSettings, Settings


@pytest.fixture(scope="session")
def started_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def browser(started_browser: Browser) -> Browser:
    """The browser of all tests of a process, without what an earlier one left open or logged."""
    started_browser.begin_anew()
    return started_browser


@pytest.fixture
def site(redis_url: str, partition: str) -> Iterator[Site]:
    """A console of the test's own partition, with a token."""
    settings = Settings(bus=BusSettings(partition=partition), console=ConsoleSettings(token=TOKEN))
    with serving_console(redis_url, settings) as made:
        yield made


@pytest.fixture
def on_bus(redis_url: str, partition: str) -> Callable[[Callable[[Bus], Awaitable[Any]]], Any]:
    """Does something on the bus of the test's partition."""

    def run(action: Callable[[Bus], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            bus = await Bus.connect(redis_url, BusSettings(partition=partition))
            try:
                return await action(bus)
            finally:
                await bus.close()

        return asyncio.run(connected())

    return run
