"""Where a partition's server is: plain addresses, masters behind Sentinel and Cluster, and the
embedded server.

A partition's keys share one hash tag, so a partition lives on one node even in a cluster: a plain
client to that node is enough. What differs is only how a new connection learns its address:

- plain: the URL's own, or the master that the server there names once it was found to be a replica;
- sentinels name the master, any node of a cluster names the owner of the partition's slot;
- the embedded server has written its address into its folder, and a process that waits for
  one that has ended starts it anew (see :mod:`.embedded`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot
from redis.exceptions import ConnectionError, RedisError

from .address import Address, BusAddress, parse
from .embedded import Place, place_of

__all__ = ["Address", "Locator", "open_pool"]


class Locator(Protocol):
    """Says where the next connection goes."""

    place: Place | None
    """Where the newest connection went."""

    async def locate(self) -> Place:
        """The address, and its password if it is not the URL's."""

    async def moved(self) -> None:
        """A server refused since it is not in charge any more."""

    def instead(self, place: Place) -> Place | None:
        """Where to go instead of a place that does not answer."""


def open_pool(
    url: str, partition: str, settings: dict[str, Any]
) -> tuple[ConnectionPool, Locator | None]:
    """A pool of connections to the partition's master, and who knows where that is; nothing is
    sent yet.

    Args:
        settings: keywords of every connection, for example timeouts.

    Raises:
        ValueError: if the URL is none of the grammar (:mod:`.address`), naming what is wrong.
    """
    address = parse(url)
    keywords: dict[str, Any] = {**settings, **address.options, "db": address.database}
    if address.username:
        keywords["username"] = address.username
    if address.password:
        keywords["password"] = address.password
    if address.scheme == "unix":
        keywords.pop("socket_keepalive", None)
        pool = ConnectionPool(UnixDomainSocketConnection, path=address.path, **keywords)
        return pool, None
    locator = _locator(address, partition, settings, keywords)
    kind = _LocatedTLS if address.secure else _Located
    return ConnectionPool(kind, locator=locator, **keywords), locator


def _locator(
    address: BusAddress, partition: str, settings: dict[str, Any], keywords: dict[str, Any]
) -> Locator:
    secure: dict[str, Any] = {"ssl": True} if address.secure else {}
    match address.kind:
        case "sentinel":
            tls = {name: value for name, value in keywords.items() if name.startswith("ssl_")}
            known = {**settings, **secure, **tls, **address.sentinel}
            return _Sentinels(list(address.hosts), address.service, known)
        case "cluster":
            slot = key_slot(f"{{{partition}}}".encode())
            return _Cluster(list(address.hosts), slot, {**keywords, **secure})
        case "embedded":
            return _Embedded(Path(address.path))
    return _Plain(address.hosts[0], {**keywords, **secure})


class _Plain:
    """The URL's own address; after it was found to be a replica, the master that it names."""

    place: Place | None = None

    def __init__(self, home: Address, settings: dict[str, Any]) -> None:
        self._home, self._settings = home, settings
        self._now = self._master = home

    async def locate(self) -> Place:
        return Place(*self._now)

    async def moved(self) -> None:
        with contextlib.suppress(RedisError, OSError, TimeoutError, LookupError, ValueError):
            role = await _ask(self._home, self._settings, "ROLE")
            replica = role[0] in (b"slave", b"replica")
            self._master = (role[1].decode(), int(role[2])) if replica else self._home
            self._now = self._master

    def instead(self, place: Place) -> Place | None:
        self._now = self._master if self._now == self._home else self._home
        other = Place(*self._now)
        return other if other != place else None


class _Asked:
    """Those who are asked anew for every connection."""

    place: Place | None = None

    async def moved(self) -> None:
        """The next connection asks."""

    def instead(self, place: Place) -> Place | None:
        """The next connection asks."""
        return None


class _Sentinels(_Asked):
    """The master of a service, as sentinels say."""

    def __init__(self, hosts: list[Address], service: str, settings: dict[str, Any]) -> None:
        self._sentinel = Sentinel(hosts, sentinel_kwargs=settings)  # type: ignore[no-untyped-call]
        self._service = service

    async def locate(self) -> Place:
        host, port = await self._sentinel.discover_master(self._service)
        return Place(str(host), int(port))


class _Cluster(_Asked):
    """The owner of a slot: one node after the other is asked, seeds and those heard of."""

    def __init__(self, seeds: list[Address], slot: int, settings: dict[str, Any]) -> None:
        self._known, self._slot, self._settings = list(seeds), slot, settings

    async def locate(self) -> Place:
        failures = []
        for host, port in list(self._known):
            try:
                ranges = await _ask((host, port), self._settings, "CLUSTER", "SLOTS")
            except (TimeoutError, RedisError, OSError) as error:
                failures.append(f"{host}:{port}: {error}")
                continue
            masters = {(first, last): _address(node, host) for first, last, node, *_ in ranges}
            self._known += [node for node in masters.values() if node not in self._known]
            for (first, last), master in masters.items():
                if first <= self._slot <= last:
                    return Place(*master)
            failures.append(f"{host}:{port}: no node owns slot {self._slot}")
        raise ConnectionError("; ".join(failures))


class _Embedded(_Asked):
    """The bundled server of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def locate(self) -> Place:
        return await place_of(self._folder)


async def _ask(where: Address, settings: dict[str, Any], *command: str) -> list[Any]:
    """The reply to one command as it comes: redis-py's own parsers expect other clients."""
    client = Redis(**{**settings, "host": where[0], "port": where[1]})
    try:
        connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command(*command)
            reply: list[Any] = await connection.read_response()
            return reply
        finally:
            await client.connection_pool.release(connection)
    finally:
        await client.aclose()


def _address(node: list[Any], asked: str) -> Address:
    """A node of CLUSTER SLOTS; one without a name is the one that was asked."""
    host = node[0].decode() if node[0] else ""
    return (host if host not in ("", "?") else asked), int(node[1])


class _Located(Connection):
    """A connection that asks where to go each time it is opened."""

    def __init__(self, *, locator: Locator, **settings: Any) -> None:
        super().__init__(**settings)
        self._locator = locator

    async def _connect(self) -> None:
        place = await self._locator.locate()
        try:
            await self._connect_to(place)
        except (OSError, TimeoutError):
            other = self._locator.instead(place)
            if other is None:
                raise
            await self._connect_to(other)

    async def _connect_to(self, place: Place) -> None:
        self.host, self.port = place.host, place.port
        if place.password:
            self.password = place.password
        await super()._connect()  # type: ignore[no-untyped-call]
        self._locator.place = place


class _LocatedTLS(_Located, SSLConnection):
    """The same over TLS."""
