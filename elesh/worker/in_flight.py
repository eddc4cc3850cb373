"""Keyed locks, and the limit on a worker's entries in flight.

Promises: a lock is taken in the order in which it was asked for. An entry that waits for one longer
than a second, because an analysis takes long, gets :class:`Busy` and is released to the rest of the
fleet. A worker has as many entries in flight as it can analyse in a quarter of a second, and at
least one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from weakref import WeakValueDictionary

__all__ = ["LONG_SECONDS", "Busy", "InFlightLimit", "KeyedLocks"]

PATIENCE_SECONDS = 1.0
LONG_SECONDS = 0.25
"""An analysis that takes longer is long: beside it nothing more is taken for the child."""
_WEIGHT = 0.2
"""Of the latest analysis in the running mean of what one takes."""


class Busy(Exception):
    """What went before takes long: another worker may be sooner."""


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
        """Have the lock, without losing the place in its queue between looks."""
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
        self._since: float | None = None

    @contextlib.contextmanager
    def analysing(self) -> Iterator[None]:
        """Around an analysis."""
        self._since = begun = self._clock()
        try:
            yield
        finally:
            seconds, self._since = self._clock() - begun, None
            before = seconds if self._mean is None else self._mean
            self._mean = before + _WEIGHT * (seconds - before)

    @property
    def long(self) -> bool:
        """Whether the analysis that is under way takes long."""
        return self._since is not None and self._clock() - self._since > LONG_SECONDS

    @property
    def at_once(self) -> int:
        """Entries to have in flight; one while nothing is known."""
        if self._mean is None:
            return 1
        return max(1, min(self._most, int(LONG_SECONDS / max(self._mean, 1e-6))))
