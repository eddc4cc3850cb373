"""The telemetry buffer: events are sent after the work, in their order, many in a round trip.

Promises: work never waits for it. While the bus is away, or where more waits than
fits, events are dropped with a line in the log that counts them, and the work goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from elesh.bus import Bus
from elesh.observe import SparseLines, carrier_of, get_logger
from leyline import Message, Priority
from leyline.streams import Stream

__all__ = ["TelemetryBuffer"]

_SOURCE = "elesh"
_MOST = 1000
"""Events that may wait."""
_BATCH = 100
"""Events of one round trip."""
_END_SECONDS = 3.0
"""For what is left when the worker ends."""


@dataclass(frozen=True)
class _Event:
    stream: Stream
    message: Message
    about: dict[str, Any]


class TelemetryBuffer:
    """Publishes what one worker tells the world."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[_Event] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._dropped = 0
        self._lines = SparseLines(get_logger(__name__))

    def put(self, stream: Stream, message: Message, run_id: str, epoch: int | None) -> None:
        """Have a message published soon, in the trace that is current now."""
        about = {"run_id": run_id, "epoch": epoch, "carrier": carrier_of()}
        if len(self._waiting) >= _MOST:
            self._dropped += 1
            return
        self._waiting.append(_Event(stream, message, about))
        self._wake.set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Publish until the block ends, and then what is left, for at most three seconds."""
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            self._ended = True
            self._wake.set()
            await asyncio.wait({keeping}, timeout=_END_SECONDS)
            keeping.cancel()

    async def _keep(self) -> None:
        while not self._ended or self._waiting:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._send()

    async def _send(self) -> None:
        """One round trip; all of it is asked for in one turn of the loop."""
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        publishing = (
            self._bus.publish(
                event.stream, event.message, source=_SOURCE, priority=Priority.LOW, **event.about
            )
            for event in batch
        )
        answers = await asyncio.gather(*publishing, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        if dropped := self._dropped:
            self._dropped = 0
            self._lines.warning("telemetry dropped", dropped, reason=f"{_MOST} events waited")
        if failed:
            self._lines.warning("telemetry missed", len(failed), reason=str(failed[0]))
