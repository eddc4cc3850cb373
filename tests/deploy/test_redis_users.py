"""deploy/redis/users.acl: each role can do its work with its own Redis user, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from servers import Server, redis_binary, valkey
from station import Station, checkpoint, ready, send

from elesh.bus import Bus, BusUnavailable
from elesh.settings import BusSettings
from leyline import Level, OperatorAction
from leyline.streams import CHECKPOINTS, DEAD, DECISIONS, OPERATIONS, STREAMS

ACL = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
ROLES = ("trainer", "worker", "operator", "console")
SETTINGS = BusSettings(partition="acl", lease_seconds=2)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with the file's users, each with its role as password."""
    binary = valkey() if request.param == "valkey" else redis_binary()
    if binary is None:
        pytest.skip("no redis-server on the PATH nor in the environment")
    folder = tmp_path_factory.mktemp("acl")
    lines = ACL.read_text().splitlines()
    users = [line for line in lines if line and not line.startswith("#")]
    for role in ROLES:
        head = f"user elesh-{role} on resetpass"
        users = [line.replace(head, f"{head} >{role}") for line in users]
    (folder / "users.acl").write_text("\n".join(users) + "\n")
    with Server(folder, "--aclfile", str(folder / "users.acl"), binary=binary) as started:
        yield started


def url(server: Server, role: str) -> str:
    return f"redis://elesh-{role}:{role}@127.0.0.1:{server.port}/0"


def on_bus(server: Server, role: str, action: Callable[[Bus], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        bus = await Bus.connect(url(server, role), SETTINGS)
        try:
            return await action(bus)
        finally:
            await bus.close()

    return asyncio.run(run())


def test_nobody_comes_in_without_a_name_and_no_password_is_shipped(server: Server) -> None:
    with server.client() as redis, pytest.raises((AuthenticationError, ResponseError)):
        redis.ping()
    users = [line for line in ACL.read_text().splitlines() if line.startswith("user ")]
    assert len(users) == 5
    assert not any(">" in line or "nopass" in line or " #" in line for line in users)


def test_each_role_can_do_its_work(server: Server, tmp_path: Path) -> None:
    station = Station(url(server, "worker"), "acl", tmp_path)
    worker = station.worker()

    async def trainer(bus: Bus) -> None:
        await send(bus, CHECKPOINTS, await ready(bus, checkpoint()))
        await bus.publish(
            CHECKPOINTS, await ready(bus, checkpoint(number=2)), source="t", event_id="e"
        )
        last, decisions = "0", []
        while len(decisions) < 2:
            last, found = await bus.follow(DECISIONS, last_id=last, block_seconds=2)
            decisions += found
        assert await bus.blobs.get(await bus.blobs.put(b"x")) == b"x"
        assert await bus.runs.claim("run", "token", "me", 5) is None
        assert await bus.runs.taken_back("run") == []
        await bus.runs.give_up("run", "token")

    async def operator(bus: Bus) -> None:
        (dead_letter,) = await bus.dead_letters.all()
        assert (await bus.dead_letters.redrive(dead_letter.entry_id, "jo")).again
        await bus.dead_letters.drop(dead_letter.entry_id, "jo")
        await bus.breakers.trip("run", Level.CHANNEL, "by hand")
        await bus.breakers.reset("run", Level.CHANNEL)
        now = datetime.now(UTC)
        action = OperatorAction(action="breaker_reset", subject="run", operator="jo", at=now)
        await bus.publish(OPERATIONS, action, source="operator")

    async def console(bus: Bus) -> None:
        for stream in STREAMS:
            await bus.read(stream, count=1)
        assert await bus.registry.workers()
        assert await bus.registry.backlog()
        await bus.dead_letters.all()
        await bus.breakers.show()
        with pytest.raises(BusUnavailable, match=r"users\.acl"):
            await bus.breakers.trip("run", Level.CHANNEL, "not allowed")

    try:
        on_bus(server, "trainer", trainer)
        with Redis.from_url(url(server, "trainer")) as redis:
            redis.xadd(CHECKPOINTS.key("acl"), {"envelope": b"\xc1 nonsense"})
        station.wait_for(lambda: station.read(DEAD), "the dead letter")
        on_bus(server, "console", console)
        on_bus(server, "operator", operator)
        assert worker.process.poll() is None, worker.log
        assert not any("NOPERM" in line or "permission" in line for line in worker.log), worker.log
        assert worker.end() == 0
    finally:
        worker.process.kill()


KEY = "elesh:{acl}:"
FORBIDDEN: dict[str, list[tuple[str, ...]]] = {
    "trainer": [
        ("XADD", KEY + "decisions", "*", "envelope", "x"),
        ("XADD", KEY + "operations", "*", "envelope", "x"),
        ("XREADGROUP", "GROUP", "elesh-workers", "t", "STREAMS", KEY + "checkpoints", ">"),
        ("HSET", KEY + "record:x", "fingerprint", "x"),
        ("HSET", KEY + "breaker:run", "state", "closed"),
        ("DEL", KEY + "blob:x"),
        ("XTRIM", KEY + "checkpoints", "MAXLEN", "0"),
        ("GET", "somebody:else"),
    ],
    "worker": [
        ("XDEL", KEY + "dead", "1-1"),
        ("XGROUP", "DESTROY", KEY + "checkpoints", "elesh-workers"),
        ("GET", "somebody:else"),
        ("MIGRATE", "127.0.0.1", "1", KEY + "x", "0", "1"),
    ],
    "operator": [
        ("XADD", KEY + "decisions", "*", "envelope", "x"),
        ("HSET", KEY + "record:x", "fingerprint", "x"),
        ("XREADGROUP", "GROUP", "elesh-workers", "o", "STREAMS", KEY + "checkpoints", ">"),
        ("XTRIM", KEY + "checkpoints", "MAXLEN", "0"),
    ],
    "console": [
        ("XADD", KEY + "operations", "*", "envelope", "x"),
        ("XDEL", KEY + "dead", "1-1"),
        ("HSET", KEY + "breaker:run", "state", "closed"),
        ("SET", KEY + "blob:x", "x"),
        ("DEL", KEY + "record:x"),
    ],
}
NOBODY = [
    ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"),
    ("ACL", "LIST"), ("SHUTDOWN",), ("KEYS", "*"), ("SCRIPT", "FLUSH"),
    ("CLIENT", "KILL", "TYPE", "normal"), ("REPLICAOF", "NO", "ONE"), ("MONITOR",), ("SAVE",),
]  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_nothing_else_is_allowed(server: Server, role: str) -> None:
    with Redis.from_url(url(server, role)) as redis:
        for command in (*FORBIDDEN[role], *NOBODY):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)
            # A script has no more rights than who runs it.
            if command in FORBIDDEN[role]:
                quoted = ", ".join(f"'{part}'" for part in command)
                with pytest.raises(
                    ResponseError, match=r"(?i)permission|can't (run|access)|NOPERM"
                ):
                    redis.eval(f"return redis.call({quoted})", 0)
