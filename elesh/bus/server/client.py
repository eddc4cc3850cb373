"""The connection to Redis: explicit timeouts, no hidden retries, shared round trips, the server's
clock, one error for "not available", and how long to wait then.

Promises: a command is sent at most once (a retry after a lost answer would publish twice), every
answer is awaited for at most ``SOCKET_TIMEOUT`` seconds (so a frozen server or a half-open
connection is noticed), and whatever keeps the server from serving surfaces as
:class:`BusUnavailable`. An error reply that no code of ours expects is an outage
(:class:`BusRefuses`), whatever the server calls it: a server that refuses today may serve tomorrow.
After one that may mean that another server is in charge, the next connection goes to that one.

Pauses grow with the length of an outage, from a quarter of a second to a minute, with jitter, so
that what waits goes on soon after a short outage and asks little during a long one; a pause ends at
once when ``stop`` is set; all who use one bus say together at most one line a minute, with the
reason and what to do, and one when it serves again.

Commands that many tasks send in the same turn of the loop share one round trip. Each is answered
for itself and fails for itself: what stands next to it in the pipeline changes nothing but when it
is sent. Where the connection fails, all that were on the way hear of it. A task that is cancelled
waits no longer; what it asked for may still happen, as with a command of its own.

No time of one host is ever compared with that of another: what is published says when by the
server's clock, and what comes is judged by it. It is asked for once a minute and after every
failure of the connection (another server may have taken over, with a clock of its own), and in
between goes on with this host's clock that never jumps.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    DataError,
    RedisError,
    ResponseError,
)

from elesh.bus.errors import BadAddress, BusRefuses, BusUnavailable
from elesh.observe import get_logger

from .address import Locator, open_pool, parse

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
_CANCEL_SECONDS = 0.2
_LINE_SECONDS = 60.0
_log = get_logger(__name__)
_dice = random.Random()  # of our own: a trainer's generator is not ours to draw from
T = TypeVar("T")


class OutageLog:
    """Logs the outages of one bus, once for all its users."""

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
        """``who`` was served, or no longer waits."""
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
        if self._since is not None:
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


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until all have ended, whatever they return or raise: a cancellation that meets
    an answer can get lost (python/cpython#86296)."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=_CANCEL_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


ALONE = object()
"""The answer to a command that had no company: it is better sent without a pipeline."""

_MOST = 128
"""Commands of one round trip: the first is not to wait long for the last."""
Asked = tuple[tuple[Any, ...], Mapping[str, Any], asyncio.Future[Any]]


class Gathering:
    """Sends what the tasks of a loop ask of one client in one turn in one round trip.

    Args:
        seconds: to wait at most for the answers of a round trip.
    """

    def __init__(self, client: Redis, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        self._asked: list[Asked] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def send(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The answer to a command, which goes with whatever else is asked in this turn; ``ALONE``,
        and nothing was sent, if nothing else is."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if not self._asked:
            loop.call_soon(self._flush)
        self._asked.append((args, options, answer))
        return await answer

    def _flush(self) -> None:
        asked, self._asked = self._asked, []
        if len(asked) == 1:
            if not asked[0][2].done():
                asked[0][2].set_result(ALONE)
            return
        for start in range(0, len(asked), _MOST):
            sending = asyncio.create_task(self._exchange(asked[start : start + _MOST]))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _exchange(self, asked: list[Asked]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for args, options, _ in asked:
            pipeline.execute_command(*args, **options)
        try:
            async with asyncio.timeout(self._seconds):
                answers = await pipeline.execute(raise_on_error=False)
        except Exception as error:
            answers = [error] * len(asked)
        for (_, _, future), answer in zip(asked, answers, strict=True):
            if future.done():  # its task was cancelled
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


SOCKET_TIMEOUT = 6.0
"""Seconds to wait for any answer: a server that hangs is noticed after them."""
MAX_BLOCK = 2.0
"""Seconds a command may block on the server; well below SOCKET_TIMEOUT, since servers overrun."""
_CONNECT_TIMEOUT = 3.0
# Over connecting and answering together, whatever the library may be waiting for inside.
_WATCHDOG = 2 * (_CONNECT_TIMEOUT + SOCKET_TIMEOUT)
_HEALTH_CHECK = 15
# Short ones that never block: those of one turn of the loop share a round trip.
_GATHERED = frozenset({"EVALSHA", "EVALSHA_RO", "EVAL", "EVAL_RO", "HGETALL", "HMGET", "TIME"})


class Client(Redis):
    """A Redis client of one URL that says :class:`BusUnavailable` when the server cannot serve."""

    url: str = ""
    failed: Callable[[], None] = staticmethod(lambda: None)
    """Called whenever a connection failed or another server may have taken over."""
    _gathering: Gathering
    locator: Locator | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command; see the module's promises."""
        try:
            if args[0] in _GATHERED:
                answer = await self._gathering.send(args, options)
                if answer is not ALONE:
                    return answer
            async with asyncio.timeout(_WATCHDOG):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if is_expected(str(args[0]), error):
                raise
            if may_have_moved(error):
                await self._moved()
            raise refusal(self.url, error) from error
        except AuthenticationError as error:
            hint = "check user and password"
            raise BusRefuses(self.url, "NOAUTH", error, hint=hint) from error
        except BusyLoadingError as error:
            raise BusRefuses(self.url, "LOADING", error, hint="it is loading its data") from error
        except DataError:
            raise  # ours: a value that no command takes
        except (RedisError, OSError) as error:
            self.failed()
            raise BusUnavailable(self.url, error) from error

    async def _moved(self) -> None:
        """Have the next connection ask who is in charge now."""
        self.failed()
        if self.locator is not None:
            await self.locator.moved()
        await self.connection_pool.disconnect()


def require_address(url: str) -> None:
    """Refuse a URL that names no bus; nothing is sent.

    Raises:
        BadAddress: naming what is wrong.
    """
    try:
        parse(url)
    except ValueError as error:
        raise BadAddress(url, error, hint="use redis://host:port/0") from None


def open_client(url: str, partition: str = "main") -> Client:
    """A client of ``url`` for one partition; nothing is sent yet.

    Raises:
        BadAddress: if the URL does not name a bus (see :mod:`elesh.bus.server.address`).
    """
    try:
        pool, locator = open_pool(
            url,
            partition,
            {
                "socket_timeout": SOCKET_TIMEOUT,
                "socket_connect_timeout": _CONNECT_TIMEOUT,
                "socket_keepalive": True,
                "health_check_interval": _HEALTH_CHECK,
                "protocol": 2,
                "retry": Retry(NoBackoff(), 0),
            },
        )
    except (ValueError, TypeError) as error:
        raise BadAddress(url, error, hint="use redis://host:port/0") from None
    client = cast(Client, Client.from_pool(pool))
    client.url, client.locator = url, locator
    client._gathering = Gathering(client, _WATCHDOG)
    return client


_SECONDS = 60.0
"""Between two questions: no host's clock drifts far in that time."""


class ServerClock:
    """The time of the server that one client talks to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._offset: float | None = None
        self._asked = 0.0
        client.failed = self._doubt
        self._asking: asyncio.Task[None] | None = None

    async def now(self) -> datetime:
        """The time there."""
        if self._offset is None or time.monotonic() - self._asked > _SECONDS:
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
        self._offset = int(seconds) + int(microseconds) / 1e6 - (before + self._asked) / 2

    def _doubt(self) -> None:
        """Ask anew before the next use: it may be another server."""
        self._asked = float("-inf")

    def latest(self) -> datetime:
        """The time there by the last answer; this host's, before there was any."""
        if self._offset is None:
            return datetime.now(UTC)
        return datetime.fromtimestamp(time.monotonic() + self._offset, UTC)


def _ignored(asking: asyncio.Task[None]) -> None:
    """Retrieve the error of an answer that nothing awaits, so that asyncio does not log it."""
    if not asking.cancelled():
        asking.exception()
