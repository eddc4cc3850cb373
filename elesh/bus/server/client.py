"""The connection to Redis: explicit timeouts, no hidden retries, one error for "not available".

Promises: a command is sent at most once (a retry after a lost answer would publish twice), every
answer is awaited for at most ``SOCKET_TIMEOUT`` seconds (so a frozen server or a half-open
connection is noticed), and whatever keeps the server from serving surfaces as
:class:`BusUnavailable`, after which the next connection goes to whoever is master then. Coming back
is :func:`until_available`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import tenacity
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from elesh.bus.errors import BusUnavailable

from .locate import open_pool
from .pipelining import ALONE, Gathering

__all__ = ["MAX_BLOCK", "SOCKET_TIMEOUT", "Client", "open_client", "until_available"]

SOCKET_TIMEOUT = 6.0
"""Seconds to wait for any answer: a server that hangs is noticed after them."""
MAX_BLOCK = 2.0
"""Seconds a command may block on the server; well below SOCKET_TIMEOUT, since servers overrun."""
_CONNECT_TIMEOUT = 3.0
# Over connecting and answering together, whatever the library may be waiting for inside.
_WATCHDOG = 2 * (_CONNECT_TIMEOUT + SOCKET_TIMEOUT)
_HEALTH_CHECK = 15
_LONGEST_PAUSE = 10.0
# States of a server that pass: no disk, no quorum, no master, loading, resharding.
_PASSING = (
    "MISCONF", "NOREPLICAS", "MASTERDOWN", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "BUSY ", "DENIED",
)  # fmt: skip
# Short ones that never block: those of one turn of the loop share a round trip.
_GATHERED = frozenset({"EVALSHA", "EVALSHA_RO", "SCRIPT LOAD", "HGETALL", "HMGET"})
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Client(Redis):
    """A Redis client of one URL that says :class:`BusUnavailable` when the server cannot serve."""

    url: str = ""
    _gathering: Gathering

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command; see the module's promises."""
        try:
            if args[0] in _GATHERED:
                answer = await self._gathering.send(args, options)
                if answer is not ALONE:
                    return answer
            async with asyncio.timeout(_WATCHDOG):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except AuthenticationError as error:
            raise BusUnavailable(self.url, error, hint="check user and password") from error
        except (ConnectionError, TimeoutError, OSError) as error:
            raise BusUnavailable(self.url, error) from error
        except NoPermissionError as error:
            hint = "give the user its rights, see deploy/redis/users.acl"
            raise BusUnavailable(self.url, error, hint=hint) from error
        except OutOfMemoryError as error:
            raise BusUnavailable(self.url, error, hint="see its memory") from error
        except (ReadOnlyError, AskError) as error:
            # Another node is in charge now: the next connection asks which.
            await self.connection_pool.disconnect()
            raise BusUnavailable(self.url, error, hint="see its role") from error
        except ResponseError as error:
            if str(error).startswith(_PASSING):
                raise BusUnavailable(self.url, error, hint="see the server's log") from error
            raise


def open_client(url: str, partition: str = "main") -> Client:
    """A client of ``url`` for one partition; nothing is sent yet.

    Raises:
        BusUnavailable: if the URL is none of a bus (see :mod:`elesh.bus.server.locate`).
    """
    try:
        pool = open_pool(
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
        raise BusUnavailable(url, error, hint="use redis://host:port/0") from None
    client = cast(Client, Client.from_pool(pool))
    client.url = url
    client._gathering = Gathering(client, _WATCHDOG)
    return client


_widening = tenacity.wait_exponential(multiplier=0.25, max=_LONGEST_PAUSE)
_dice = random.Random()  # of our own: a trainer's generator is not ours to draw from


def _pause(state: tenacity.RetryCallState) -> float:
    """Exponential backoff with full jitter."""
    return _dice.uniform(0, _widening(state))


async def until_available(
    action: Callable[[], Awaitable[T]], *, stop: asyncio.Event | None = None
) -> T | None:
    """What ``action`` returns once it no longer raises :class:`BusUnavailable`.

    Tries again with exponential backoff and full jitter, up to ten seconds apart, and says so in
    one line of the log. Returns None if ``stop`` is set first.
    """
    stop = stop or asyncio.Event()

    async def attempt() -> T:
        return await action()

    async def pause(seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
        _log.log(level, "%s; trying until it is back", error)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(BusUnavailable),
        wait=_pause,
        stop=lambda _state: stop.is_set(),
        sleep=pause,
        before_sleep=tell,
    )
    try:
        return await retrying(attempt)
    except tenacity.RetryError:
        return None
