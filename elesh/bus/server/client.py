"""The connection to Redis: explicit timeouts, no hidden retries, shared round trips, the server's
clock, one error for "not available".

Promises: a command is sent at most once (a retry after a lost answer would publish twice), every
answer is awaited for at most ``SOCKET_TIMEOUT`` seconds (so a frozen server or a half-open
connection is noticed), and whatever keeps the server from serving surfaces as
:class:`BusUnavailable`, an error reply as :class:`BusRefuses`; after one that may mean that another
server is in charge, the next connection goes to that one. Waiting and trying again is
:mod:`.outage`'s part.

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
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    DataError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from elesh.bus.errors import BadAddress, BusRefuses, BusUnavailable

from .address import Locator, open_pool, parse
from .outage import is_expected, may_have_moved, refusal

__all__ = [
    "ALONE",
    "Client",
    "Gathering",
    "MAX_BLOCK",
    "SOCKET_TIMEOUT",
    "ServerClock",
    "open_client",
    "require_address",
]


ALONE = object()
"""The answer to a command that had no company: it is better sent without a pipeline."""

_MOST = 128
"""Commands of one round trip: the first is not to wait long for the last."""
Asked = tuple[tuple[Any, ...], Mapping[str, Any], asyncio.Future[Any]]


class Gathering:
    """What the tasks of one loop ask of one client.

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
            _answer(asked[0][2], ALONE)
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
            _answer(future, answer)


def _answer(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # its task was cancelled
        return
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
    _locator: Locator | None = None

    @property
    def server(self) -> tuple[str, int] | None:
        """Address and port of the server spoken to, a socket's path with port 0; None before."""
        if path := self.connection_pool.connection_kwargs.get("path"):
            return str(path), 0
        place = self._locator.place if self._locator else None
        return (place.host, place.port) if place else None

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
        except (ConnectionError, TimeoutError, RedisError, OSError) as error:
            self.failed()
            raise BusUnavailable(self.url, error) from error

    async def _moved(self) -> None:
        """Have the next connection ask who is in charge now."""
        self.failed()
        if self._locator is not None:
            await self._locator.moved()
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
        BadAddress: if the URL is none of a bus (see :mod:`elesh.bus.server.address`).
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
    client.url, client._locator = url, locator
    client._gathering = Gathering(client, _WATCHDOG)
    return client


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
