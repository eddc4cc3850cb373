"""The grammar of bus URLs, and the current address of the server that one names.

- ``redis://[user[:password]@]host[:port][/db]``, ``rediss://`` the same over TLS;
- ``unix://[user:password@]/path/of/socket[?db=1]``;
- ``redis+sentinel://s1:26379,s2:26379/SERVICE[/DB]``: the sentinels name the master;
- ``redis+cluster://n1:7000,n2:7001``: any node names the owner of the partition's slot;
- ``redis+embedded:///folder``: the bundled server of that folder, wherever it listens.

``rediss+sentinel`` and ``rediss+cluster`` are the same over TLS. Addresses of version 6 stand in
brackets. User, password, path and options are percent-decoded; a user or password whose special
characters were not encoded is read where only one reading makes sense. Options in the query: ``db``
(redis, rediss, unix), ``username``, ``password``, ``protocol`` (2), ``client_name``, over TLS
``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_password``, ``ssl_check_hostname``,
``ssl_cert_reqs``, with sentinels ``sentinel_username``, ``sentinel_password``.

A partition's keys share one hash tag, so a partition lives on one node even in a cluster: a plain
client to that node is enough. What differs is only how a new connection learns its address: a plain
URL's own, or the master that the server there names once it was found to be a replica; what the
sentinels or a node of the cluster name; what the embedded server has written into its folder (a
process that waits for one that has ended starts it anew, see :mod:`.embedded`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot
from redis.exceptions import ConnectionError, RedisError

from .embedded import Place, place_of

Address = tuple[str, int]
_SCHEMES = (
    "redis", "rediss", "unix",
    "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "redis+embedded",
)  # fmt: skip
_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}
_LONGEST_SOCKET = 107
_LONGEST_HOST, _LONGEST_LABEL = 253, 63
_LARGEST_DATABASE = 2**31 - 1
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = frozenset({*_FILES, "ssl_password", "ssl_check_hostname", "ssl_cert_reqs"})
_SENTINEL = frozenset({"sentinel_username", "sentinel_password"})
_COMMON = frozenset({"db", "username", "password", "protocol", "client_name"})
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_HOST = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<name>[^\s:\[\]@/?#,\\]*))(?::(?P<port>[0-9]*))?")
_ENCODE = "write special characters of user and password percent-encoded"


@dataclass(frozen=True)
class BusAddress:
    """A bus URL, read and checked."""

    scheme: str
    kind: str
    """``sentinel``, ``cluster``, ``embedded``, or empty."""
    hosts: tuple[Address, ...] = ()
    path: str = ""
    """Of the socket, or the folder of the embedded server."""
    service: str = ""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Keywords of a connection, beside address, user and password."""
    sentinel: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Keywords of connections to sentinels."""

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme.startswith("rediss")


def parse(url: str) -> BusAddress:
    """The parts of a bus URL.

    Raises:
        ValueError: if it does not follow the module's grammar, naming what is wrong.
    """
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in _SCHEMES:
        found = scheme.partition(":")[0][:20]
        raise ValueError(f"scheme {found!r}: expected one of {', '.join(_SCHEMES)}")
    kind = scheme.partition("+")[2]
    if scheme == "unix" or kind == "embedded":
        user, place = _local_parts(rest)
        hosts: tuple[Address, ...] = ()
    else:
        user, listed, place = _parts(rest, kind)
        hosts = _hosts(listed, kind)
    path, _, query = place.partition("?")
    if "#" in place:
        raise ValueError(f"a part after #, which a bus has not; {_ENCODE}")
    options = _options(query, scheme, kind)
    name, _, password = user.partition(":")
    known = {"username": unquote(name), "password": unquote(password)}
    for each in ("username", "password"):
        known[each] = options.pop(each, "") or known[each]
    sentinel = {each.partition("_")[2]: options.pop(each) for each in _SENTINEL & options.keys()}
    database = options.pop("db", None)
    if hosts:
        service, database = _place(path, kind, database)
        path = ""
    else:
        service, path = "", _local_path(unquote(path, errors="surrogateescape"), kind)
    return BusAddress(
        scheme, kind, hosts, path, service, database or 0, **known,
        options=options, sentinel=sentinel,
    )  # fmt: skip


def _parts(rest: str, kind: str) -> tuple[str, str, str]:
    """User part, hosts, and the rest from the path on."""
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    user, at, listed = rest[:end].rpartition("@")
    path = rest[end:].partition("?")[0]
    if at and "@" not in path:
        return user, listed, rest[end:]
    if "@" not in rest[end:] or (not at and "@" not in path and _are_hosts(listed, kind)):
        return user, listed, rest[end:]
    # A password with a slash, question mark or hash that was not encoded.
    user, _, rest = rest.rpartition("@")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    return user, rest[:end], rest[end:]


def _are_hosts(listed: str, kind: str) -> bool:
    try:
        return bool(_hosts(listed, kind)) and bool(listed.partition(":")[0])
    except ValueError:
        return False


def _local_parts(rest: str) -> tuple[str, str]:
    """User part, and the path with its query."""
    if rest.startswith("/"):
        return "", rest
    user, at, path = rest.rpartition("@/")
    if not at:
        raise ValueError(
            f"path {_shown(rest)!r}: expected an absolute one, such as unix:///run/x.sock"
        )
    return user, "/" + path


def _local_path(path: str, kind: str) -> str:
    if "\0" in path or path == "/":
        raise ValueError(f"path {path!r}: expected the path of a {'folder' if kind else 'socket'}")
    if not kind and len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise ValueError(f"path {path!r}: expected at most {_LONGEST_SOCKET} bytes, as systems do")
    return path


def _hosts(listed: str, kind: str) -> tuple[Address, ...]:
    """The addresses of ``host:port,host:port``; plain URLs have one."""
    hosts = tuple(_address(text, kind) for text in listed.split(","))
    if not kind and len(hosts) > 1:
        raise ValueError(f"{len(hosts)} addresses: expected one, or redis+cluster://")
    return hosts


def _address(text: str, kind: str) -> Address:
    found = _HOST.fullmatch(text)
    expected = "expected host:port, with an address of version 6 in brackets"
    if found is None or (kind and not (found["six"] or found["name"])):
        raise ValueError(f"address {_shown(text)!r}: {expected}; {_ENCODE}")
    host = unquote(found["six"] or found["name"]) or "localhost"
    if found["six"]:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"address {text!r}: expected an address of version 6 there") from None
    if not host.isprintable() or " " in host:
        raise ValueError(f"address {text!r}: {expected}")
    if len(host) > _LONGEST_HOST or max(map(len, host.split("."))) > _LONGEST_LABEL:
        raise ValueError(f"address {text[:40]!r}...: {len(host)} characters are no host's name")
    port = int(found["port"] or _PORTS[kind])
    if not 0 < port < 65536:
        raise ValueError(f"port {port}: expected 1 to 65535")
    return host, port


def _shown(text: str) -> str:
    """A malformed URL as it may be shown: without its password."""
    name, colon, rest = text.rpartition("@")[2].partition(":")
    known = name.startswith("[") or not rest.strip(":0123456789")
    return (f"{name}{colon}{rest}" if known else f"{name}:***")[:40]


def _place(path: str, kind: str, asked: int | None) -> tuple[str, int]:
    """The sentinels' name of the service, and the database's number."""
    steps = [unquote(step) for step in path.split("/") if step]
    service = steps.pop(0) if kind == "sentinel" and steps else ""
    if kind == "sentinel" and not service:
        raise ValueError("no service: expected redis+sentinel://host:port/SERVICE/DB")
    database = asked if not steps else _database(steps.pop(0), f"path {path!r}")
    if steps:
        raise ValueError(f"path {path!r}: expected a database number; {_ENCODE}")
    if asked is not None and asked != database:
        raise ValueError(f"databases {database} and {asked}: expected one of them")
    if kind == "cluster" and database:
        raise ValueError(f"database {database}: expected none, a cluster has only 0")
    return service, database or 0


def _database(text: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= _LARGEST_DATABASE):
        raise ValueError(f"{where}: expected a database number; {_ENCODE}")
    return int(text)


def _options(query: str, scheme: str, kind: str) -> dict[str, Any]:
    """The options of the query, checked; an unknown one is an error."""
    known = _COMMON | (_SENTINEL if kind == "sentinel" else frozenset())
    known |= _TLS if scheme.startswith("rediss") else frozenset()
    if kind:
        known -= {"db"}
    if kind == "embedded":
        known = frozenset()
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            tls = "; TLS is rediss://" if name in _TLS else ""
            expected = f"expected one of {', '.join(sorted(known))}" if known else "expected none"
            raise ValueError(f"option {name!r}: {expected}{tls}; {_ENCODE}")
        if name in options:
            raise ValueError(f"option {name!r}: expected once")
        options[name] = _value(name, value)
    return options


def _value(name: str, value: str) -> Any:
    if name == "db":
        return _database(value, f"option 'db' = {value}")
    if name == "protocol":
        if value != "2":
            raise ValueError(f"protocol={value}: expected 2, the one that Elesh speaks")
        return 2
    if name == "ssl_check_hostname":
        if value.lower() not in _BOOLEANS:
            raise ValueError(f"{name}={value}: expected true or false")
        return _BOOLEANS[value.lower()]
    if name == "ssl_cert_reqs":
        if value not in ("none", "optional", "required"):
            raise ValueError(f"{name}={value}: expected none, optional or required")
        return value
    if name in _FILES:
        if not os.path.isfile(value):
            raise ValueError(f"{name}: expected a file, found none at {value!r}")
        if not os.access(value, os.R_OK):
            raise ValueError(f"{name}: {value!r} cannot be read by this user")
    return value


class Locator(Protocol):
    """Says where the next connection goes."""

    place: Place | None
    """Where the newest connection went."""

    async def locate(self) -> Place:
        """The address, and its password if it is not the URL's."""

    async def moved(self) -> None:
        """A server refused a command because it is no longer the primary."""

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
        ValueError: if the URL does not follow the grammar (:mod:`.address`), naming what is wrong.
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
    """The nodes that every new connection asks."""

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
    """The owner of a slot: asks one node after the other, seeds and those that nodes named."""

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
            masters = {(first, last): _node_address(node, host) for first, last, node, *_ in ranges}
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


def _node_address(node: list[Any], asked: str) -> Address:
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
