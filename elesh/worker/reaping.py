"""The fleet's timekeeping beside the worker loop: reaping passes, the delayed set, deadlines,
trimming.

Every worker offers itself; the bus lets one at a time (:mod:`elesh.bus.streams.reaping`). It
goes on while the child computes, so that a busy fleet still takes over what a dead worker left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from elesh.bus import Bus, repeatedly
from elesh.observe import get_logger
from elesh.worker.telemetry.reports import Reports
from leyline.streams import WORKERS, Stream

__all__ = ["ReapingLoop"]

_TRIM_SECONDS = 60.0
_log = get_logger(__name__)


class ReapingLoop:
    """One worker's offer to reap."""

    def __init__(
        self, bus: Bus, worker_id: str, streams: Sequence[Stream], reports: Reports
    ) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._streams = streams
        self._reports = reports
        self._next_trim: float | None = None

    async def keep(self) -> None:
        """Offer, and reap whenever it is this worker's turn, until cancelled."""
        await repeatedly("reaping", self._pass, self._bus.outage)

    async def _pass(self) -> float:
        """Offer; seconds until the next time."""
        reap = await self._bus.reaper.reap(WORKERS, self._worker_id, self._streams)
        for taken in reap.taken:
            self._reports.entry(
                "reclaimed", taken.stream, taken.entry_id, "crash", f"of {taken.owner}"
            )
        for plan in reap.overdue:
            _log.warning("deadline over, joining what is there", key=plan)
        if not reap.held:
            return _apart(reap.wait_seconds)
        await self._trim()
        return reap.wait_seconds

    async def _trim(self) -> None:
        """Now and then, shorten the streams below what every group has done."""
        now = asyncio.get_running_loop().time()
        if self._next_trim is None:
            # Not at once: a fleet that restarts has better things to ask.
            self._next_trim = now + _TRIM_SECONDS * random.uniform(0.5, 1.0)
        elif now >= self._next_trim:
            self._next_trim = now + _TRIM_SECONDS
            await self._bus.trim()


def _apart(seconds: float) -> float:
    """Jitter: workers that started together do not ask together."""
    return seconds * random.uniform(1.0, 1.25)
