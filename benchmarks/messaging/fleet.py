"""How two workers do beside one on analyses that only compute.

    python -m benchmarks.messaging.fleet --checkpoints 12 --rounds 2

Real worker processes on an embedded server; each checkpoint is a network of ``--channels`` channels
with output projections of 512 samples. A round stores all blobs, then publishes all events; the
clock runs from the first that begins to the last decision. One worker and two take turns; the
fastest round of each counts.

Two workers cannot be faster than one on a machine whose cores others use, and how many cores those
use is printed. So the same is told in CPU seconds: what one worker (supervisor and child) spends on
all checkpoints, against what the busier of two spends on its share. That is the ratio of the times
on a machine with a core for each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from redis.asyncio import Redis

from benchmarks.messaging.codec import architecture
from elesh.bus import Bus, embedded_server
from elesh.settings import BusSettings
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    CheckpointMetadata,
    CheckpointReady,
    EventEnvelope,
    GateStatistics,
    Priority,
    TelemetryEvent,
    read_envelope,
    unwrap,
)
from leyline.streams import CHECKPOINTS, DECISIONS, TELEMETRY

_WIDTH = 256
_SAMPLES = 512


def checkpoint(number: int, channels: int) -> CheckpointBundle:
    """A checkpoint in the aggressive phase, with random statistics."""
    network, random = architecture([_WIDTH] * (channels // _WIDTH)), np.random.default_rng(number)

    def vector() -> np.ndarray:
        return random.random(_WIDTH, np.float32)

    statistics, gates = {}, {}
    for group in network.groups:
        statistics[group.name] = ChannelImportanceData(
            layer_name=group.name,
            taylor_importance=vector(),
            magnitude_importance=vector(),
            activation_frequency=vector(),
        )
        gates[group.name] = GateStatistics(
            layer_name=group.name,
            projections=random.standard_normal((_SAMPLES, _WIDTH), np.float32),
            first_order=vector(),
            second_order=vector(),
        )
    metadata = CheckpointMetadata(
        run_id="bench",
        checkpoint_id=f"ck-{number}",
        epoch=110,
        model_hash=network.model_hash,
        samples=_SAMPLES,
    )
    return CheckpointBundle(metadata, network, statistics, gates)


async def stored(bus: Bus, bundle: CheckpointBundle) -> CheckpointReady:
    """The event of a checkpoint whose blobs lie on the bus."""
    gates = bundle.blobs().get("gates")
    assert gates is not None
    return CheckpointReady(
        metadata=bundle.metadata,
        architecture=bundle.architecture,
        statistics=await bus.blobs.put(bundle.blobs()["statistics"]),
        gates=await bus.blobs.put(gates),
    )


async def quiet(url: str) -> None:
    """Wait until the server has rewritten its file, which takes a core for itself."""
    async with Redis.from_url(url) as server:
        while (await server.info("persistence"))["aof_rewrite_in_progress"]:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def elapsed(
    url: str, partition: str, bundles: list[CheckpointBundle], workers: int
) -> tuple[float, float]:
    """Seconds that so many workers need, and CPU seconds of the one that computed most."""
    environment = os.environ | {
        "ELESH_REDIS_URL": url,
        "ELESH_BUS__PARTITION": partition,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "elesh.cli", "worker"]
    fleet = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    try:
        for worker in fleet:
            assert worker.stderr is not None
            while " serving " not in worker.stderr.readline():
                pass
        before = [spent(worker.pid) for worker in fleet]
        seconds = asyncio.run(timed(url, partition, bundles))
        used = [spent(worker.pid) - b for worker, b in zip(fleet, before, strict=True)]
        return seconds, max(used)
    finally:
        for worker in fleet:
            worker.terminate()
        for worker in fleet:
            worker.wait()


def spent(pid: int) -> float:
    """CPU seconds of a worker and its compute child."""
    worker = psutil.Process(pid)
    times = [process.cpu_times() for process in (worker, *worker.children())]
    return sum(each.user + each.system for each in times)


async def timed(url: str, partition: str, bundles: list[CheckpointBundle]) -> float:
    """Publish, wait for all decisions, and read the time between from what the workers wrote."""
    bus = await Bus.connect(url, BusSettings(partition=partition))
    events = [await stored(bus, bundle) for bundle in bundles]
    await quiet(url)
    for event in events:
        await bus.publish(CHECKPOINTS, event, source="bench", priority=Priority.CRITICAL)
    last = "0"
    decided: list[EventEnvelope] = []
    while len(decided) < len(bundles):
        last, more = await bus.follow(DECISIONS, last_id=last, block_seconds=5)
        decided += [read_envelope(entry.envelope) for entry in more]
    told = [unwrap(read_envelope(entry.envelope)) for entry in await bus.read(TELEMETRY)]
    begun = min(m.at for m in told if isinstance(m, TelemetryEvent) and m.step == "received")
    await bus.close()
    return (max(envelope.created_at for envelope in decided) - begun).total_seconds()


def busy_seconds() -> float:
    """CPU seconds that this machine has computed so far, all cores together."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--channels", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    bundles = [checkpoint(number, asked.channels) for number in range(asked.checkpoints)]
    best = {1: float("inf"), 2: float("inf")}
    computed = dict(best)
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        before, begun = busy_seconds(), time.monotonic()
        time.sleep(2)
        others = (busy_seconds() - before) / (time.monotonic() - begun)
        for number in range(asked.rounds):
            for workers in best:
                partition = f"bench-{number}-{workers}"
                took, used = elapsed(url, partition, bundles, workers)
                print(f"round {number + 1}, {workers} worker(s): {took:.2f} s, CPU {used:.2f} s")
                best[workers] = min(best[workers], took)
                computed[workers] = min(computed[workers], used)
    cores = os.cpu_count() or 1
    print(f"{cores} cores, of which others used {others:.1f} before the first round")
    print(f"two workers against one, by the clock: {best[1] / best[2]:.2f} times")
    print(f"two workers against one, by CPU time: {computed[1] / computed[2]:.2f} times")


if __name__ == "__main__":
    main()
