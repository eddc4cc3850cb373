"""The entries that a worker holds: how many at a time, under which locks and leases, and those
taken over from dead workers.

Promises: a keyed lock is taken in the order in which it was asked for. An entry that waits for one
longer than a second, because an analysis takes long, gets :class:`Busy` and is released to the rest
of the fleet. A worker has as many entries in flight as it can analyse in a quarter of a second, and
at least one. A lease is renewed four times in its length, through a drain and however long the
child computes, as long as the entry is still this worker's; a lost lease is reported at once.

Reaping goes on while the child computes, so that a busy fleet still takes over what a dead worker
left: every worker offers itself, the bus lets one at a time
(:mod:`elesh.bus.streams.consumer_groups`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from weakref import WeakValueDictionary

from elesh.bus import Bus, Delivery, repeatedly
from elesh.observe import get_logger
from elesh.worker.telemetry.reports import Reports
from leyline.streams import WORKERS, Stream

PATIENCE_SECONDS = 1.0
LONG_SECONDS = 0.25
"""An analysis that takes longer is long: beside it nothing more is taken for the child."""
_WEIGHT = 0.2
"""Of the latest analysis in the running mean of what one takes."""


class Busy(Exception):
    """An earlier analysis takes long here: another worker may serve the entry sooner."""


class KeyedLocks:
    """Locks by key: tasks of one key run one after another, those of other keys do not wait.

    Args:
        long: whether an analysis is under way that takes long; else waiting is cheap.
    """

    def __init__(self, long: Callable[[], bool]) -> None:
        self._long = long
        # A lock that is neither held nor waited for is forgotten.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of ``name``.

        Raises:
            Busy: if it is not free within a second because an analysis takes long.
        """
        lock = self._locks.setdefault(name, asyncio.Lock())
        if lock.locked():
            await self._wait(lock)
        else:
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    async def _wait(self, lock: asyncio.Lock) -> None:
        """Wait for the lock, in the order of its queue."""
        acquiring = asyncio.create_task(lock.acquire())
        try:
            while not (await asyncio.wait({acquiring}, timeout=PATIENCE_SECONDS))[0]:
                if self._long():
                    raise Busy(f"what came before it takes more than {PATIENCE_SECONDS:g} s")
        except BaseException:
            if not acquiring.cancel():  # it came at the last moment
                lock.release()
            raise


class InFlightLimit:
    """How long analyses take here, and so how many entries are worth having in flight.

    Args:
        most: entries to have in flight at most.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._mean: float | None = None
        self.entries = 1
        """To have in flight; one while nothing is known."""
        self._since: float | None = None

    @contextlib.contextmanager
    def analysing(self) -> Iterator[None]:
        """Measure how long an analysis takes."""
        self._since = begun = self._clock()
        try:
            yield
        finally:
            seconds, self._since = self._clock() - begun, None
            before = seconds if self._mean is None else self._mean
            self._mean = before + _WEIGHT * (seconds - before)
            fit = int(LONG_SECONDS / max(self._mean, 1e-6))
            self.entries = max(1, min(self._most, fit))

    @property
    def long(self) -> bool:
        """Whether the analysis that is under way takes long."""
        return self._since is not None and self._clock() - self._since > LONG_SECONDS


class Leases:
    """The entries that one worker holds.

    Args:
        on_lost: called with an entry that is not this worker's any more: another one has it, or it
            was ended while the renewal was under way.
    """

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        streams: Sequence[Stream],
        on_lost: Callable[[Delivery], None],
    ) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._streams = streams
        self._on_lost = on_lost
        self._held: list[Delivery] = []

    async def claim(
        self, streams: Sequence[Stream], count: int, block_seconds: float
    ) -> list[Delivery]:
        """Up to ``count`` entries, whose leases are kept from now on."""
        claimed = await self._bus.groups.claim(
            WORKERS, self._worker_id, streams, count=count, block_seconds=block_seconds
        )
        self._held += claimed
        return claimed

    def drop(self, delivery: Delivery) -> None:
        """Forget an entry that was served, lost or requeued."""
        self._held = [held for held in self._held if held is not delivery]

    async def release(self, delivery: Delivery, detail: str, delay_seconds: float = 0.0) -> bool:
        """Give an entry back that was not begun; its delivery does not count."""
        self.drop(delivery)
        return await self._bus.groups.requeue(
            WORKERS,
            self._worker_id,
            delivery,
            cause="handover",
            detail=detail,
            delay_seconds=delay_seconds,
        )

    async def retry(self, delivery: Delivery, detail: str, delay_seconds: float) -> bool:
        """Have an entry served again after a while: this worker failed with it."""
        return await self._bus.groups.requeue(
            WORKERS,
            self._worker_id,
            delivery,
            cause="exception",
            detail=detail,
            delay_seconds=delay_seconds,
        )

    async def leave(self) -> int:
        """Give everything back and leave the group; how many entries it was."""
        self._held = []
        given = await self._bus.groups.requeue_all(WORKERS, self._worker_id, self._streams)
        await self._bus.groups.leave(WORKERS, self._worker_id, self._streams)
        return given

    async def keep(self) -> None:
        """Renew what is held until cancelled."""
        seconds = self._bus.settings.lease_seconds / 4
        # After an outage owners have a grace of 3/8 of a lease to renew in.
        await repeatedly(
            "renewing leases", self._renew, self._bus.outage, after=seconds, longest=seconds / 2
        )

    async def _renew(self) -> float:
        held = list(self._held)
        for lost in await self._bus.groups.renew(WORKERS, self._worker_id, held):
            if lost in self._held:
                self._on_lost(lost)
        return self._bus.settings.lease_seconds / 4


_TRIM_SECONDS = 60.0
_log = get_logger(__name__)


class ReapingLoop:
    """One worker's part in reaping: it offers itself, and the bus lets one reap at a time."""

    def __init__(
        self, bus: Bus, worker_id: str, streams: Sequence[Stream], reports: Reports
    ) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._streams = streams
        self._reports = reports
        self._next_trim: float | None = None

    async def step(self) -> float:
        """Offer to reap; seconds until the next offer. Now and then, shorten the streams below
        what every group has done."""
        reap = await self._bus.reaper.reap(WORKERS, self._worker_id, self._streams)
        for taken in reap.taken:
            self._reports.entry(
                "reclaimed", taken.stream, taken.entry_id, "crash", f"of {taken.owner}"
            )
        for plan in reap.overdue:
            _log.warning("plan past its deadline, its parts so far are joined", key=plan)
        if not reap.held:
            return _apart(reap.wait_seconds)
        now = asyncio.get_running_loop().time()
        if self._next_trim is None:
            # Not at once: a fleet that restarts has better things to ask.
            self._next_trim = now + _TRIM_SECONDS * random.uniform(0.5, 1.0)
        elif now >= self._next_trim:
            self._next_trim = now + _TRIM_SECONDS
            await self._bus.trim()
        return reap.wait_seconds


def _apart(seconds: float) -> float:
    """Jitter: workers that started together do not ask together."""
    return seconds * random.uniform(1.0, 1.25)
