"""The server's clock: asked for rarely, and anew when another server may have taken over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

from elesh.bus import BusUnavailable
from elesh.bus.server.client import ServerClock


class Servers:
    """A client whose server's clock can be set, and that can be away."""

    def __init__(self) -> None:
        self.failed: Callable[[], None] = lambda: None
        self.at, self.asked, self.away = 1_000_000, 0, False

    async def time(self) -> tuple[int, int]:
        self.asked += 1
        await asyncio.sleep(0.01)
        if self.away:
            raise BusUnavailable("redis://h", "gone")
        return self.at, 0


def test_it_is_asked_once_and_again_after_a_failure_of_the_connection() -> None:
    async def scenario() -> None:
        servers = Servers()
        clock = ServerClock(cast(Any, servers))
        await asyncio.gather(*(clock.now() for _ in range(5)))
        assert servers.asked == 1
        servers.at = 900_000  # a replica whose clock is behind takes over
        assert (await clock.now()).timestamp() >= 1_000_000
        servers.failed()
        assert await clock.now() < datetime.fromtimestamp(901_000, UTC)
        assert servers.asked == 2

    asyncio.run(scenario())


def test_an_answer_that_nobody_waits_for_any_more_may_fail_silently() -> None:
    async def scenario() -> list[str]:
        complaints: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, about: complaints.append(str(about["message"]))
        )
        servers = Servers()
        servers.away = True
        asking = asyncio.create_task(ServerClock(cast(Any, servers)).now())
        await asyncio.sleep(0)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError, BusUnavailable):
            await asking
        await asyncio.sleep(0.05)
        del asking, servers
        gc.collect()
        return complaints

    assert asyncio.run(scenario()) == []
