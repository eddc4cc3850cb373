"""The server's time: the only one that two hosts have in common.

Promises: no time of one host is ever compared with that of another; what is published says when by
this clock, and what comes is judged by it. It is asked for once a minute and after every failure
of the connection (another server may have taken over, with a clock of its own), and in between goes
on with this host's clock that never jumps.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from .client import Client

__all__ = ["ServerClock"]

_SECONDS = 60.0
"""Between two questions: no host's clock drifts far in that time."""


class ServerClock:
    """The time of the server that one client talks to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ahead: float | None = None
        self._asked = 0.0
        client.failed = self._doubt
        self._asking: asyncio.Task[None] | None = None

    async def now(self) -> datetime:
        """The time there."""
        if self._ahead is None or time.monotonic() - self._asked > _SECONDS:
            # Tasks that ask at once share one answer, and go on in the same turn of the loop, so
            # that what they send next shares a round trip, too.
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
                self._asking.add_done_callback(_ignored)
            await asyncio.shield(self._asking)
        return self.latest()

    async def _ask(self) -> None:
        before = time.monotonic()
        seconds, microseconds = await self._client.time()
        self._asked = time.monotonic()
        # The answer was made some time between question and answer.
        self._ahead = int(seconds) + int(microseconds) / 1e6 - (before + self._asked) / 2

    def _doubt(self) -> None:
        """Ask anew before the next use: it may be another server."""
        self._asked = float("-inf")

    def latest(self) -> datetime:
        """The time there by the last answer; this host's, before there was any."""
        if self._ahead is None:
            return datetime.now(UTC)
        return datetime.fromtimestamp(time.monotonic() + self._ahead, UTC)


def _ignored(asking: asyncio.Task[None]) -> None:
    """Retrieve the error of an answer that is not awaited any more, so that it is not logged."""
    if not asking.cancelled():
        asking.exception()
