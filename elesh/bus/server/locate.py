"""Where a partition's server is: the grammar of bus URLs, masters behind Sentinel and Cluster.

A partition's keys share one hash tag, so a partition lives on one node even in a cluster: a plain
client to that node is enough. What differs is only how a new connection learns its address:

- ``redis://`` and ``rediss://`` (TLS), ``unix://``: as the URL says;
- ``redis+sentinel://s1:26379,s2:26379/SERVICE/DB``: the sentinels name the master;
- ``redis+cluster://n1:7000,n2:7001``: any node names the owner of the partition's slot.

``rediss+sentinel`` and ``rediss+cluster`` are the same over TLS. Options in the query:
``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_check_hostname``, ``ssl_cert_reqs``,
``sentinel_username``, ``sentinel_password``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot
from redis.exceptions import ConnectionError, RedisError

__all__ = ["Address", "open_pool"]

Address = tuple[str, int]
Locate = Callable[[], Awaitable[Address]]
_SCHEMES = (
    "redis", "rediss", "unix",
    "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip
_OPTIONS = frozenset(
    {
        "db", "username", "password", "protocol", "client_name",
        "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_check_hostname",
        "ssl_cert_reqs",
    }
)  # fmt: skip
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
_DEFAULT_PORT = {"sentinel": 26379, "cluster": 6379}


def open_pool(url: str, partition: str, settings: dict[str, Any]) -> ConnectionPool:
    """A pool of connections to the partition's master; nothing is sent yet.

    Args:
        settings: keywords of every connection, for example timeouts.

    Raises:
        ValueError: if the URL is none of the module's grammar, naming what is wrong.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"scheme {parts.scheme!r}: expected one of {', '.join(_SCHEMES)}")
    base, _, kind = parts.scheme.partition("+")
    sentinel_options = _require_options(parts, kind)
    if not kind:
        return ConnectionPool(**parse_url(url), **settings)
    user, hosts = _authority(parts, kind)
    service, database = _place(parts.path, kind)
    options = [pair for pair in parse_qsl(parts.query) if pair[0] not in _SENTINEL_OPTIONS]
    plain = f"{base}://{user}127.0.0.1/{database}?{urlencode(options)}"
    keywords: Any = {**parse_url(plain), **settings}
    secure = issubclass(keywords.pop("connection_class", Connection), SSLConnection)
    if kind == "sentinel":
        security = {"ssl": True, **_tls(keywords)} if secure else {}
        locate = _master_of(hosts, service, {**settings, **security, **sentinel_options})
    else:
        ask: dict[str, Any] = {"ssl": True, **keywords} if secure else dict(keywords)
        locate = _owner_of(hosts, key_slot(f"{{{partition}}}".encode()), ask)
    keywords["connection_class"] = _LocatedTLS if secure else _Located
    return ConnectionPool(locate=locate, **keywords)


def _require_options(parts: SplitResult, kind: str) -> dict[str, str]:
    """The sentinels' own options; any that nobody knows is an error."""
    known = _OPTIONS | (_SENTINEL_OPTIONS.keys() if kind == "sentinel" else set())
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    for name, _ in pairs:
        if name not in known:
            raise ValueError(f"option {name!r}: expected one of {', '.join(sorted(known))}")
    return {_SENTINEL_OPTIONS[name]: value for name, value in pairs if name in _SENTINEL_OPTIONS}


def _authority(parts: SplitResult, kind: str) -> tuple[str, list[Address]]:
    """The user part with its ``@``, and the addresses of ``host:port,host:port``."""
    user, at, listed = parts.netloc.rpartition("@")
    addresses = []
    for text in listed.split(","):
        one = urlsplit(f"//{text}")
        try:
            host, port = one.hostname, one.port or _DEFAULT_PORT[kind]
        except ValueError:
            host = None
        if not host:
            raise ValueError(f"address {text!r}: expected host:port,host:port")
        addresses.append((host, port))
    return user + at, addresses


def _place(path: str, kind: str) -> tuple[str, int]:
    """The sentinels' name of the service, and the database's number."""
    steps = [unquote(step) for step in path.split("/") if step]
    service = steps.pop(0) if kind == "sentinel" and steps else ""
    if kind == "sentinel" and not service:
        raise ValueError("no service: expected redis+sentinel://host:port/SERVICE/DB")
    database = steps.pop(0) if steps else "0"
    if steps or not database.isdecimal() or (kind == "cluster" and database != "0"):
        wanted = "no database (a cluster has only 0)" if kind == "cluster" else "a database number"
        raise ValueError(f"path {path!r}: expected {wanted}")
    return service, int(database)


def _tls(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name.startswith("ssl_")}


def _master_of(hosts: list[Address], service: str, settings: dict[str, Any]) -> Locate:
    sentinel = Sentinel(hosts, sentinel_kwargs=settings)  # type: ignore[no-untyped-call]

    async def locate() -> Address:
        host, port = await sentinel.discover_master(service)
        return str(host), int(port)

    return locate


def _owner_of(seeds: list[Address], slot: int, settings: dict[str, Any]) -> Locate:
    """Asks one node after the other, seeds and those that were heard of, who owns the slot."""
    known = list(seeds)

    async def locate() -> Address:
        failures = []
        for host, port in list(known):
            try:
                ranges = await _slots(host, port, settings)
            except (TimeoutError, RedisError, OSError) as error:
                failures.append(f"{host}:{port}: {error}")
                continue
            masters = {(first, last): _address(node, host) for first, last, node, *_ in ranges}
            known.extend(node for node in masters.values() if node not in known)
            for (first, last), master in masters.items():
                if first <= slot <= last:
                    return master
            failures.append(f"{host}:{port}: nobody owns slot {slot}")
        raise ConnectionError("; ".join(failures))

    return locate


async def _slots(host: str, port: int, settings: dict[str, Any]) -> list[Any]:
    client = Redis(**{**settings, "host": host, "port": port})
    try:
        # CLUSTER SLOTS as it comes: redis-py's own parser expects its cluster client.
        connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command("CLUSTER", "SLOTS")
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

    def __init__(self, *, locate: Locate, **settings: Any) -> None:
        super().__init__(**settings)
        self._locate = locate

    async def _connect(self) -> None:
        self.host, self.port = await self._locate()
        await super()._connect()  # type: ignore[no-untyped-call]


class _LocatedTLS(_Located, SSLConnection):
    """The same over TLS."""
