"""A bus that is away or refuses: it is waited for, in pauses, with few words, whatever it says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from bus_messages import GROUP, claim, key, publish, result
from redis import Redis
from redis.exceptions import ResponseError
from servers import Server, free_port, redis_binary, valkey

from elesh.bus import Backoff, Bus, BusRefuses, BusUnavailable, CommitOutcome, OutageLog, repeatedly
from elesh.bus.server.client import LONGEST_PAUSE, is_expected, refusal
from elesh.settings import BusSettings
from leyline import TooLarge
from leyline.streams import OUTCOMES

SETTINGS = BusSettings()
KEY = OUTCOMES.key("main")
COMMANDS = ("EVALSHA", "EVAL", "XREADGROUP", "XPENDING", "XINFO STREAM", "XGROUP CREATE", "GET")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_with_the_outage_to_a_minute_and_are_short_again_after_it():
    clock = Clock()
    backoff = Backoff(OutageLog(clock), clock=clock)
    tries, longest = 0, 0.0
    while clock.now < 60:
        pause = backoff.next_pause()
        assert 0.125 <= pause <= max(0.25, clock.now / 3)
        clock.now += pause
        tries += 1
    assert tries < 60, "few commands a minute"
    while clock.now < 3600:
        pause = backoff.next_pause()
        longest = max(longest, pause)
        clock.now += pause
    assert LONGEST_PAUSE / 2 < longest <= LONGEST_PAUSE
    backoff.served()
    assert backoff.next_pause() <= 0.25


def test_all_who_wait_say_together_one_line_a_minute_and_one_at_the_end(caplog):
    clock = Clock()
    log = OutageLog(clock)
    with caplog.at_level(logging.INFO, "elesh.bus"):
        for second in range(150):
            clock.now = float(second)
            for who in ("a", "b"):
                log.failed(who, BusUnavailable("redis://h", "gone", hint="start it"))
        log.served("a")
        assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
        log.served("b")
    assert caplog.records[-1].getMessage().startswith("bus serves again")
    assert "gone; start it" in caplog.text
    assert len(caplog.records) == 4


def test_steps_go_on_after_an_outage_and_after_an_error_of_ours(caplog):
    errors = iter([BusUnavailable("redis://h", "gone"), ValueError("ours"), None])
    done = []

    async def step() -> float:
        if error := next(errors, None):
            raise error
        done.append(1)
        return 0.0 if len(done) < 3 else 3600.0

    async def scenario() -> None:
        task = asyncio.create_task(repeatedly("steps", step))
        async with asyncio.timeout(60):
            while len(done) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert "steps failed, trying again" in caplog.text


@pytest.mark.parametrize(
    "reply",
    [
        "READONLY You can't write", "NOREPLICAS Not enough good replicas", "MISCONF disk",
        "OOM command not allowed", "NOPERM User u has no permissions", "WRONGTYPE Operation",
        "UNBLOCKED client unblocked", "BUSY Redis is busy", "MASTERDOWN Link with MASTER",
        "CLUSTERDOWN Hash slot not served", "TRYAGAIN Multiple keys", "EXECABORT Transaction",
        "ERR DB index is out of range", "SOMETHINGNEW that no version says today",
        "ERR The user executing the script can't run this command or subcommand script",
        "ERR ACL failure in script: User u has no permissions", "ERR unknown command 'XADD'",
    ],
)  # fmt: skip
def test_whatever_a_server_replies_is_an_outage_with_something_to_do(reply):
    error = ResponseError(reply)
    assert not any(is_expected(command, error) for command in COMMANDS)
    refused = refusal("redis://h", error)
    assert refused.code in ("NOPERM", reply.split()[0])
    assert str(refused).partition("; ")[2]


def test_what_callers_handle_themselves_is_no_outage_and_to_other_commands_it_is_one():
    for reply, handled in {
        "NOGROUP No such key": {"XREADGROUP", "XPENDING", "XINFO STREAM"},
        "BUSYGROUP exists": {"XGROUP CREATE"},
        "ERR no such key": {"XINFO STREAM"},
        "NOSCRIPT No matching script": {"EVALSHA"},
    }.items():
        error = ResponseError(reply)
        assert {command for command in COMMANDS if is_expected(command, error)} == handled
        assert str(refusal("redis://h", error)).partition("; ")[2]


@pytest.mark.parametrize("reply", ["NOGROUP x", "NOSCRIPT x", "BUSYGROUP x", "ERR no such key"])
def test_a_reply_that_is_handled_elsewhere_and_stays_is_an_outage_too(reply):
    """A server that answers everything with it, as a proxy in trouble does."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            for _ in range(int(line[1:])):
                await reader.readexactly(int((await reader.readline())[1:]) + 2)
            writer.write(f"-{reply}\r\n".encode())

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        bus = Bus.open(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", SETTINGS)
        asked = (
            lambda: publish(bus, 1), lambda: claim(bus), lambda: bus.record(key(1)),
            lambda: bus.follow(OUTCOMES, last_id="$", block_seconds=0), bus.registry.backlog,
            lambda: bus.runs.claim("run", "token", "who", 1.0), lambda: bus.blobs.put(b"x"),
            lambda: bus.reaper.reap(GROUP, "w1", [OUTCOMES]), bus.ping, bus.trim,
        )  # fmt: skip
        said = await asyncio.gather(*(each() for each in asked), return_exceptions=True)
        assert all(isinstance(each, BusUnavailable) for each in said), said
        await bus.close()
        server.close()

    asyncio.run(scenario())


@pytest.fixture(params=["valkey", pytest.param("redis", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path: Path):
    binary = valkey() if request.param == "valkey" else redis_binary()
    if binary is None:
        pytest.skip("no redis-server on this machine")
    with Server(tmp_path, binary=binary) as made:
        yield made


def _set(**options: str) -> Callable[[Redis], object]:
    return lambda redis: [redis.config_set(n.replace("_", "-"), v) for n, v in options.items()]


REFUSALS = {
    "full": (_set(maxmemory="1mb"), _set(maxmemory="0"), "OOM"),
    "too few replicas": (
        _set(min_replicas_to_write="1"), _set(min_replicas_to_write="0"), "NOREPLICAS"
    ),
    "a replica without its master": (
        lambda redis: redis.replicaof("127.0.0.1", str(free_port())),
        lambda redis: redis.replicaof("NO", "ONE"),
        "READONLY",
    ),
    "a right is missing in scripts": (
        lambda redis: redis.execute_command("ACL SETUSER default -xadd -xack -hset"),
        lambda redis: redis.execute_command("ACL SETUSER default +@all"),
        "NOPERM",
    ),
    "a key of another type": (
        lambda redis: (redis.rename(KEY, "kept"), redis.set(KEY, "x")),
        lambda redis: redis.rename("kept", KEY),
        "WRONGTYPE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_server_that_refuses_is_waited_for_and_nothing_is_lost(server: Server, kind, caplog):
    begin, end, code = REFUSALS[kind]

    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        await publish(bus, 1)
        (delivery,) = await claim(bus)
        with server.client() as redis:
            begin(redis)
            with pytest.raises(BusRefuses) as refused:
                await bus.commit(GROUP, "w1", delivery, result(1))
            assert refused.value.code == code
            waiting = asyncio.create_task(
                bus.persistently(lambda: bus.commit(GROUP, "w1", delivery, result(1)))
            )
            await asyncio.sleep(0.5)
            assert not waiting.done()
            end(redis)
        assert await waiting is CommitOutcome.COMMITTED
        assert (await bus.record(key(1))) is not None
        await bus.close()

    with caplog.at_level(logging.INFO, "elesh.bus"):
        asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("bus cannot serve, trying again")
    assert said[1].startswith("bus serves again")


def test_what_a_server_never_takes_ends_after_a_few_tries(server: Server):
    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        with server.client() as redis:
            redis.config_set("proto-max-bulk-len", "1mb")
        with pytest.raises(TooLarge, match="proto-max-bulk-len"):
            await bus.persistently(lambda: bus.blobs.put(b"x" * (3 << 20)))
        await publish(bus, 1)
        await bus.close()

    asyncio.run(scenario())


def test_an_evicting_policy_is_named(server: Server):
    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        assert await bus.eviction() == ""
        with server.client() as redis:
            redis.config_set("maxmemory-policy", "allkeys-lru")
            redis.config_set("maxmemory", "1gb")
        assert "noeviction" in await bus.eviction()
        await bus.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("way", ["REPLICAOF", "FAILOVER"])
@pytest.mark.sampled
def test_a_plain_url_follows_the_master_that_its_server_names(tmp_path: Path, way: str):
    async def scenario(first: Server, second: Server) -> None:
        bus = await Bus.connect(first.url, SETTINGS)
        await publish(bus, 1)
        with first.client() as one, second.client() as two:
            while two.xlen(KEY) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            if way == "FAILOVER":
                one.execute_command("FAILOVER")
            else:
                two.replicaof("NO", "ONE")
                one.replicaof("127.0.0.1", str(second.port))

        async def go_on() -> None:
            await publish(bus, 2)

        async with asyncio.timeout(60):
            await bus.persistently(go_on)
        with second.client() as two:
            assert two.xlen(KEY) == 2
        await bus.close()

    with Server(tmp_path / "a") as first, Server(tmp_path / "b") as second:
        with second.client() as two:
            two.replicaof("127.0.0.1", str(first.port))
        asyncio.run(scenario(first, second))
