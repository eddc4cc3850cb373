"""The connection to Redis: explicit timeouts, no hidden retries, one error for "not available".

Promises: a command is sent at most once (a retry after a lost answer would publish twice), every
answer is awaited for at most ``SOCKET_TIMEOUT`` seconds (so a frozen server or a half-open
connection is noticed), and whatever keeps the server from serving surfaces as
:class:`BusUnavailable`, an error reply as :class:`BusRefuses`; after one that may mean that another
server is in charge, the next connection goes to that one. Waiting and trying again is
:mod:`.outage`'s part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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

from .address import parse
from .locate import Locator, open_pool
from .pipelining import ALONE, Gathering
from .refusals import is_expected, may_have_moved, refusal

__all__ = ["MAX_BLOCK", "SOCKET_TIMEOUT", "Client", "open_client", "require_address"]

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
