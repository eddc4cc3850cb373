"""An outage: how long to wait for a bus that is away or refuses, and what is said of it.

Promises: pauses grow with the length of the outage, from a quarter of a second to a minute, with
jitter, so that what waits goes on soon after a short outage and asks little during a long one; a
pause ends at once when ``stop`` is set; all who use one bus say together at most one line a minute,
with the reason and what to do, and one when it serves again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from elesh.bus.errors import BadAddress, BusUnavailable
from elesh.observe import get_logger

__all__ = ["LONGEST_PAUSE", "Backoff", "OutageLog", "repeatedly", "until_available"]

LONGEST_PAUSE = 60.0
_SHORTEST_PAUSE = 0.25
_SHARE = 1 / 3
"""A pause is at most this share of the outage so far: its end is noticed in good time."""
_LINE_SECONDS = 60.0
_log = get_logger(__name__)
_dice = random.Random()  # of our own: a trainer's generator is not ours to draw from
T = TypeVar("T")


class OutageLog:
    """What is said of one bus that cannot serve, by all who use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failing: dict[object, float] = {}
        self._since: float | None = None
        self._tries = 0
        self._said = False
        self._next_line = float("-inf")

    def failed(self, who: object, error: Exception) -> None:
        """``who`` met an error and will try again."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        self._failing[who] = now
        self._tries += 1
        if now >= self._next_line:
            self._next_line, self._said = now + _LINE_SECONDS, True
            _log.warning(
                "bus cannot serve, trying again",
                reason=str(error),
                tries=self._tries,
                seconds=round(now - self._since),
            )

    def served(self, who: object) -> None:
        """``who`` was served, or waits no more."""
        if self._failing.pop(who, None) is None or self._failing or self._since is None:
            return
        if self._said:
            _log.info("bus serves again", seconds=round(self._clock() - self._since))
        self._since, self._tries, self._said = None, 0, False


class Backoff:
    """The pauses of one loop that tries until the bus serves.

    Args:
        stop: ends a pause, and with it the trying.
        longest: seconds of a pause at most, for what must not come late after an outage.
    """

    def __init__(
        self,
        log: OutageLog | None = None,
        stop: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        longest: float = LONGEST_PAUSE,
    ) -> None:
        self._log, self._stop, self._clock = log or OutageLog(), stop or asyncio.Event(), clock
        self._longest = longest
        self._since: float | None = None

    async def pause(self, error: Exception) -> bool:
        """Wait before the next try; False if ``stop`` is set."""
        if self._stop.is_set():
            self.served()
            return False
        self._log.failed(self, error)
        try:
            async with asyncio.timeout(self.next_pause()):
                await self._stop.wait()
        except TimeoutError:
            return True
        except asyncio.CancelledError:
            self.served()
            raise
        self.served()
        return False

    def next_pause(self) -> float:
        """Seconds to wait now; the outage began with the first call since the last success."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        longest = min(max((now - self._since) * _SHARE, _SHORTEST_PAUSE), self._longest)
        return longest * _dice.uniform(0.5, 1.0)

    def served(self) -> None:
        """The last try succeeded: the next pause is a short one again."""
        self._since = None
        self._log.served(self)


async def until_available(
    action: Callable[[], Awaitable[T]],
    *,
    stop: asyncio.Event | None = None,
    log: OutageLog | None = None,
) -> T | None:
    """What ``action`` returns once it no longer raises :class:`BusUnavailable`.

    Returns None if ``stop`` is set first.

    Raises:
        BadAddress: at once; waiting does not help.
    """
    backoff = Backoff(log, stop)
    while True:
        try:
            found = await action()
        except BadAddress:
            raise
        except BusUnavailable as error:
            if not await backoff.pause(error):
                return None
        else:
            backoff.served()
            return found


async def repeatedly(
    what: str,
    step: Callable[[], Awaitable[float]],
    log: OutageLog | None = None,
    *,
    after: float = 0.0,
    longest: float = LONGEST_PAUSE,
) -> None:
    """Take a step again and again, each after the seconds that the last one returned.

    Goes on until it is cancelled: a bus that cannot serve is waited for, and any other error of a
    step is said, at most once a minute, and tried again like that.

    Args:
        what: names the steps in the log.
        after: seconds before the first step.
        longest: as for :class:`Backoff`.
    """
    backoff, next_line = Backoff(log, longest=longest), float("-inf")
    await asyncio.sleep(after)
    while True:
        try:
            seconds = await step()
        except BusUnavailable as error:
            await backoff.pause(error)
            continue
        except Exception:
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + _LINE_SECONDS
                _log.exception(f"{what} failed, trying again")
            await asyncio.sleep(backoff.next_pause())
            continue
        backoff.served()
        await asyncio.sleep(seconds)
