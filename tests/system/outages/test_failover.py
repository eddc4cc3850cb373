"""Another server takes over under a run, in every way there is: all decisions are heard."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError
from servers import PATIENCE, Server, free_port, redis_binary, valkey
from station import Station, checkpoint

from elesh.settings import BusSettings, Settings
from elesh.trainer import Session

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
_EPOCHS = 12
"""Checkpoints of the run; a failover comes after the fourth and after the eighth."""


@dataclass
class Pair:
    """Two servers, one of which is in charge, and how the other takes over."""

    url: str
    fail_over: Callable[[], None]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if condition():
                return
        except RedisError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def role(server: Server) -> str:
    with server.client() as redis:
        return str(redis.info("replication")["role"])


def in_step(master: Server) -> bool:
    with master.client() as redis:
        known = redis.info("replication")
        return known["connected_slaves"] == 1 and known["slave0"]["state"] == "online"


@contextmanager
def by_replicas(folder: Path, binary: str, way: str) -> Iterator[Pair]:
    """REPLICAOF by hand, FAILOVER, or one that sentinels are told to do."""
    with ExitStack() as stack:
        pair = [stack.enter_context(Server(folder / name, binary=binary)) for name in "ab"]
        with pair[1].client() as redis:
            redis.replicaof("127.0.0.1", str(pair[0].port))
        until(lambda: in_step(pair[0]))
        url = pair[0].url
        if way == "SENTINEL":
            url, port = started(stack, folder, binary, pair[0])

        def fail_over() -> None:
            old = next(one for one in pair if role(one) == "master")
            new = next(one for one in pair if one is not old)
            until(lambda: in_step(old))
            if way == "SENTINEL":
                until(lambda: commanded(port, "SENTINEL FAILOVER", "main"))
            elif way == "FAILOVER":
                commanded(old.port, "FAILOVER")
            else:
                commanded(new.port, "REPLICAOF", "NO", "ONE")
                commanded(old.port, "REPLICAOF", "127.0.0.1", str(new.port))
            until(lambda: role(new) == "master" and role(old) != "master" and in_step(new))

        yield Pair(url, fail_over)


def started(stack: ExitStack, folder: Path, binary: str, master: Server) -> tuple[str, int]:
    """A sentinel that watches ``master``: the URL by it, and its port."""
    port, made = free_port(), folder / "sentinel.conf"
    made.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds main 5000\nsentinel failover-timeout main 3000\n"
    )
    process = subprocess.Popen(
        [binary, str(made), "--sentinel"], stdout=subprocess.DEVNULL, cwd=folder
    )
    stack.callback(process.wait)
    stack.callback(process.kill)

    def sees_replica() -> bool:
        with Redis(port=port) as redis:
            return bool(redis.sentinel_slaves("main"))

    until(sees_replica)
    return f"redis+sentinel://127.0.0.1:{port}/main/0", port


@contextmanager
def by_cluster(folder: Path, binary: str) -> Iterator[Pair]:
    """A cluster of one master that has all slots, a second without any, and a replica."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000")
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Server(folder / name, *options, binary=binary)) for name in "abc"
        ]
        commanded(nodes[0].port, "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        for other in nodes[1:]:
            commanded(other.port, "CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port))
        identity = commanded(nodes[0].port, "CLUSTER", "MYID")
        until(lambda: commanded(nodes[1].port, "CLUSTER", "REPLICATE", identity))
        pair = nodes[:2]
        until(lambda: in_step(pair[0]))

        def fail_over() -> None:
            old = next(one for one in pair if role(one) == "master")
            new = next(one for one in pair if one is not old)
            until(lambda: in_step(old))
            until(lambda: commanded(new.port, "CLUSTER", "FAILOVER"))
            until(lambda: role(new) == "master" and role(old) != "master" and in_step(new))

        yield Pair(f"redis+cluster://127.0.0.1:{nodes[0].port}", fail_over)


def commanded(port: int, *command: str) -> str:
    with Redis(port=port, socket_timeout=10) as redis:
        answer = redis.execute_command(*command)
        return answer.decode() if isinstance(answer, bytes) else str(answer)


@pytest.mark.parametrize("way", ["REPLICAOF", "FAILOVER", "SENTINEL", "CLUSTER"])
@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_every_decision_of_a_run_is_heard_whatever_takes_over(
    tmp_path: Path, kind: str, way: str
) -> None:
    binary = valkey() if kind == "valkey" else redis_binary()
    if binary is None:
        pytest.skip("no redis-server on this machine")
    servers = (
        by_cluster(tmp_path, binary) if way == "CLUSTER" else by_replicas(tmp_path, binary, way)
    )
    with servers as pair:
        station = Station(pair.url, "failover", tmp_path)
        worker = station.worker()
        settings = Settings(bus=BusSettings(partition="failover"))
        heard: set[str] = set()
        asked: set[str] = set()
        try:
            with Session("run", pair.url, settings) as session:
                for number in range(_EPOCHS):
                    bundle = checkpoint(number=number)
                    asked.add(str(bundle.decision_key))
                    assert session.publish(bundle)
                    if number in (4, 8):
                        pair.fail_over()
                    session.wait(0.3)
                    heard.update(each.idempotency_key for each in session.decisions())
                deadline = time.monotonic() + PATIENCE
                while heard < asked and time.monotonic() < deadline:
                    session.wait(1)
                    heard.update(each.idempotency_key for each in session.decisions())
                assert heard == asked, (session.failed, "".join(worker.log))
                assert (session.missed, session.failed) == (0, {})
            assert worker.end() == 0
        finally:
            worker.process.kill()
