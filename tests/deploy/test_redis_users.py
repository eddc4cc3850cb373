"""deploy/redis/users.acl: each role can do its work with its own Redis user, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from servers import Server, redis_binary, valkey
from station import PATIENCE, Station, checkpoint
from typer.testing import CliRunner

from elesh.bus import Bus, BusUnavailable
from elesh.cli import app
from elesh.settings import BusSettings, Settings
from elesh.trainer import Session
from leyline import Level, PruningOutcome, StructuralPruningDecision
from leyline.streams import AUDIT, CHECKPOINTS, DEAD

ACL = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
ROLES = ("trainer", "worker", "operator", "console")
SETTINGS = BusSettings(partition="acl", lease_seconds=2)


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.slow)])
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


def settings(server: Server, role: str) -> Settings:
    return Settings(bus=SETTINGS.model_copy(update={"url": url(server, role)}))


def as_trainer(server: Server) -> None:
    """A session from its first checkpoint to its outcome, with a claim and a decision between."""
    session = Session("run", url(server, "trainer"), settings(server, "trainer"))
    with session:
        assert session.publish(checkpoint())
        assert session.request(checkpoint(number=2), "by-name")
        decisions: list[StructuralPruningDecision] = []
        while len(decisions) < 2:
            assert session.wait(PATIENCE), session.missed
            decisions += session.decisions()
        outcome = PruningOutcome(
            idempotency_key=decisions[0].idempotency_key,
            run_id="run",
            epoch=decisions[0].epoch,
            result="applied",
        )
        assert session.report(outcome)
    assert session.missed == 0


COMMANDS = {
    "console": [
        ("status",),
        ("events",),
        ("breaker", "show"),
        ("dead", "list"),
        ("audit", "show"),
        ("audit", "verify"),
        ("audit", "export", "-"),
        ("history", "run"),
    ],
    "operator": [
        ("breaker", "trip", "run", "channel", "--reason", "by hand"),
        ("breaker", "show"),
        ("breaker", "reset", "run", "channel"),
        ("dead", "redrive", "LETTER"),
        ("dead", "show", "LETTER"),
        ("dead", "drop", "LETTER"),
        ("status",),
        ("events", "--stream", "operations"),
        ("audit", "verify"),
    ],
}


@pytest.mark.slow
def test_each_role_does_its_whole_work_through_the_products_own_commands(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELESH_BUS__PARTITION", "acl")
    station = Station(url(server, "worker"), "acl", tmp_path)
    worker = station.worker(constants={"telemetry.auditor.SECONDS": 0.2})
    try:
        as_trainer(server)
        with Redis.from_url(url(server, "trainer")) as redis:
            redis.xadd(CHECKPOINTS.key("acl"), {"envelope": b"\xc1 nonsense"})
        station.wait_for(lambda: station.read(DEAD), "the dead letter")
        station.wait_for(lambda: len(station.read(AUDIT)) >= 4, "the audit log")
        (letter,) = [delivery.entry_id for delivery in station.read(DEAD)]
        for role, commands in COMMANDS.items():
            for command in commands:
                said = [part.replace("LETTER", letter) for part in command]
                done = CliRunner().invoke(app, [*said, "--redis", url(server, role)])
                told = (role, command, done.output, repr(done.exception))
                assert "permission" not in done.output, told
                assert done.exit_code == 0, told
        with pytest.raises(BusUnavailable, match=r"users\.acl"):
            on_bus(server, "console", lambda bus: bus.breakers.trip("run", Level.CHANNEL, "no"))
        on_bus(server, "worker", lambda bus: bus.trim())
        assert worker.process.poll() is None, worker.log
        assert not any("NOPERM" in line or "permission" in line for line in worker.log), worker.log
        assert worker.end() == 0, worker.log
    finally:
        worker.process.kill()


KEY = "elesh:{acl}:"
AUDIT_LOG = KEY + "audit"
TAMPERING = [
    ("DEL", AUDIT_LOG), ("UNLINK", AUDIT_LOG), ("XTRIM", AUDIT_LOG, "MAXLEN", "0"),
    ("XDEL", AUDIT_LOG, "1-1"), ("XSETID", AUDIT_LOG, "9-9"), ("SET", AUDIT_LOG, "x"),
    ("GETDEL", AUDIT_LOG), ("EXPIRE", AUDIT_LOG, "1"), ("PEXPIRE", AUDIT_LOG, "1"),
    ("RENAME", AUDIT_LOG, KEY + "x"), ("RENAME", KEY + "x", AUDIT_LOG),
    ("COPY", KEY + "x", AUDIT_LOG, "REPLACE"), ("RESTORE", AUDIT_LOG, "0", "x", "REPLACE"),
    ("XGROUP", "CREATE", AUDIT_LOG, "g", "$"), ("DEL", AUDIT_LOG + ":head"),
    ("SUNIONSTORE", AUDIT_LOG, KEY + "x"), ("ZUNIONSTORE", AUDIT_LOG, "1", KEY + "x"),
    ("BITOP", "NOT", AUDIT_LOG, KEY + "x"), ("SORT", KEY + "x", "STORE", AUDIT_LOG),
]  # fmt: skip
"""What would shorten, replace or end the audit log; none of it is anybody's."""


def ending(key: str, but: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """What would delete or replace everything at a key, but for some commands."""
    commands = [
        ("DEL", key), ("UNLINK", key), ("SET", key, "x"), ("EXPIRE", key, "0"),
        ("PEXPIRE", key, "0"), ("SUNIONSTORE", key, key), ("ZUNIONSTORE", key, "1", key),
        ("RENAME", key, KEY + "x"), ("BITOP", "NOT", key, key),
    ]  # fmt: skip
    return [each for each in commands if each[0] not in but]


FORBIDDEN: dict[str, list[tuple[str, ...]]] = {
    "trainer": [
        ("XADD", KEY + "decisions", "*", "envelope", "x"),
        ("XADD", KEY + "operations", "*", "envelope", "x"),
        ("XREADGROUP", "GROUP", "elesh-workers", "t", "STREAMS", KEY + "checkpoints", ">"),
        ("HSET", KEY + "record:x", "fingerprint", "x"),
        ("HSET", KEY + "breaker:run", "state", "closed"),
        ("DEL", KEY + "blob:x"),
        ("XTRIM", KEY + "checkpoints", "MAXLEN", "0"),
        *ending(KEY + "checkpoints"),
        ("GET", "somebody:else"),
    ],
    "worker": [
        *(each for name in ("checkpoints", "decisions", "dead") for each in ending(KEY + name)),
        *ending(KEY + "record:x", but=("EXPIRE", "PEXPIRE")),
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
        *ending(KEY + "checkpoints"),
        *ending(KEY + "dead"),
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
        for command in (*FORBIDDEN[role], *TAMPERING, *NOBODY):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)
            # A script has no more rights than who runs it.
            if command in (*FORBIDDEN[role], *TAMPERING):
                quoted = ", ".join(f"'{part}'" for part in command)
                with pytest.raises(
                    ResponseError, match=r"(?i)permission|can't (run|access)|NOPERM"
                ):
                    redis.eval(f"return redis.call({quoted})", 0)
