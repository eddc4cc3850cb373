"""An outage: which errors of a server are one, how long to wait for a bus that is away or refuses,
and what is said of it.

Promises: an error reply that no code of ours expects is an outage (:class:`BusRefuses`), whatever
the server calls it: a server that refuses today may serve tomorrow. Pauses grow with the length of
the outage, from a quarter of a second to a minute, with jitter, so that what waits goes on soon
after a short outage and asks little during a long one; a pause ends at once when ``stop`` is set;
all who use one bus say together at most one line a minute, with the reason and what to do, and one
when it serves again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import ResponseError

from elesh.bus.errors import BadAddress, BusRefuses, BusUnavailable
from elesh.observe import get_logger

__all__ = [
    "Backoff",
    "LONGEST_PAUSE",
    "OutageLog",
    "code_of",
    "is_expected",
    "may_have_moved",
    "refusal",
    "repeatedly",
    "until_available",
]


_EXPECTED = {
    "NOSCRIPT": frozenset({"EVALSHA", "EVALSHA_RO"}),
    "NOGROUP": frozenset({"XREADGROUP", "XPENDING", "XINFO"}),
    "BUSYGROUP": frozenset({"XGROUP"}),
    "no such key": frozenset({"XINFO"}),
}
"""Replies that callers handle themselves, and to which commands: to any other they are refusals."""
_MOVED = frozenset({"READONLY", "MOVED", "ASK", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED"})
"""After these another node may be in charge."""
_NO_RIGHT = ("can't run this command", "ACL failure in script", "can't access at least one")
"""How servers say inside scripts that a right is missing; the code is ERR there."""
_HINTS = {
    "OOM": "it is full: give it memory (maxmemory) or let workers catch up",
    "READONLY": "it is a replica: name the master, or use redis+sentinel:// or redis+cluster://",
    "MOVED": "another node of the cluster has it: use redis+cluster://",
    "ASK": "it is moving to another node of the cluster",
    "NOREPLICAS": "bring its replicas back, or lower min-replicas-to-write",
    "MISCONF": "it cannot write to its disk: see the server's log",
    "NOPERM": "give the user its rights, see deploy/redis/users.acl",
    "WRONGTYPE": "one of Elesh's keys holds something else: rename or delete that key",
    "UNBLOCKED": "it ended a waiting read, as servers do when another node takes over",
    "LOADING": "it is loading its data",
    "BUSY": "a script has run too long there: SCRIPT KILL ends it",
    "MASTERDOWN": "it is a replica whose master is away",
    "CLUSTERDOWN": "part of the cluster is away: see CLUSTER INFO",
    "DENIED": "it is in protected mode: bind it and give it a password",
    "NOAUTH": "check user and password",
}
_OUT_OF_RANGE = "it has fewer databases: name one that it has, see its setting databases"
_UNKNOWN = "see the server's log"


def code_of(error: ResponseError) -> str:
    """The first word of the server's error; ``NOPERM`` also where a script is refused a right."""
    text = str(error)
    if any(words in text for words in _NO_RIGHT):
        return "NOPERM"
    code: str = getattr(error, "status_code", None) or text.partition(" ")[0]
    return code if code.isupper() else "ERR"


def is_expected(command: str, error: ResponseError) -> bool:
    """Whether the caller of ``command`` handles this reply: a group, script or key that is not
    there (yet)."""
    text = f"{code_of(error)} {error}"
    name = command.partition(" ")[0].upper()
    return any(words in text and name in commands for words, commands in _EXPECTED.items())


def may_have_moved(error: ResponseError) -> bool:
    """Whether the next connection should ask anew who is in charge."""
    return code_of(error) in _MOVED


def refusal(url: str, error: ResponseError) -> BusRefuses:
    """The outage that an error reply amounts to, with what to do about it."""
    code = code_of(error)
    hint = _OUT_OF_RANGE if "DB index" in str(error) else _HINTS.get(code, _UNKNOWN)
    reason = str(error) if code == "ERR" or str(error).startswith(code) else f"{code} {error}"
    return BusRefuses(url, code, reason, hint=hint)


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
