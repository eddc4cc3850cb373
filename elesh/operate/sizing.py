"""How many servers, partitions and workers a number of runs needs, from measured costs.

Promises: pure. The costs are one file, ``sizing.json`` (CPU seconds of the machine that it names
and bytes, fitted by ``benchmarks/scale``); docs/scaling.md and ``elesh plan --runs`` read the same.

A partition lies on one node, whose server computes on one core; nodes share nothing. A trainer
reads all decisions of its partition, so what that costs grows with the square of a partition's
runs: this is where the knee lies, and why there are partitions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from elesh.bus import Bus
from elesh.settings import BusSettings

FULL = 0.5
"""Share of its one core that a server is given to do: beyond it waits grow."""
BUSY = 0.7
"""Share of its time that a worker is given to do."""


@dataclass(frozen=True)
class Costs:
    """What things cost. CPU in seconds of one core, sizes in bytes."""

    machine: str
    """Where and when it was measured."""
    checkpoint_server: float
    """A checkpoint from its publication to its decision, without its blobs, on the server."""
    checkpoint_worker: float
    """The same in the worker (supervisor), without the analysis."""
    megabyte_server: float
    """A megabyte of blobs, put and fetched."""
    megabyte_client: float
    """The same in trainer and worker together."""
    trainer_server: float
    """A trainer that waits, each second."""
    worker_server: float
    """A worker that waits, each second."""
    delivery_server: float
    """One decision that one trainer of the partition reads, whosever it is."""
    checkpoint_bytes: float
    """On the network for a checkpoint, without its blobs, both ways."""
    delivery_bytes: float
    """On the network for a delivery."""
    trainer_bytes: float
    """On the network for a trainer that waits, each second."""
    record_memory: float
    """Of a decision's record, kept for ``bus.record_ttl_seconds``."""
    entries_memory: float
    """Of a checkpoint's entries in all streams, kept until these are trimmed."""
    trainer_memory: float
    """Of a trainer's connections."""


@cache
def costs() -> Costs:
    """The costs that the package comes with."""
    known = json.loads((files(__package__) / "sizing.json").read_text())
    return Costs(**{field.name: known[field.name] for field in fields(Costs)})


@dataclass(frozen=True)
class Load:
    """The load of the bus."""

    runs: int
    interval: float = 600.0
    """Seconds between two checkpoints of a run."""
    megabytes: float = 10.0
    """Blobs of a checkpoint: statistics, and the network where cuts are verified."""
    analysis: float = 10.0
    """Seconds that a worker computes for a checkpoint."""

    @property
    def rate(self) -> float:
        """Checkpoints a second, of all runs."""
        return self.runs / self.interval


@dataclass(frozen=True)
class Size:
    """What it needs."""

    partitions: int
    servers: int
    workers: int
    cores: float
    """Cores that all servers are busy for."""
    memory: float
    """Bytes, on all servers."""
    network: float
    """Bytes a second, of all servers."""


def server_cores(load: Load, partitions: int, workers: int, of: Costs) -> float:
    """Cores that all servers together are busy for."""
    each = of.checkpoint_server + load.megabytes * of.megabyte_server
    each += load.runs / partitions * of.delivery_server
    return load.rate * each + load.runs * of.trainer_server + workers * of.worker_server


def size(load: Load, bus: BusSettings | None = None, of: Costs | None = None) -> Size:
    """The fewest partitions, servers and workers for a load."""
    kept, of = bus or BusSettings(), of or costs()
    seconds = load.analysis + of.checkpoint_worker + load.megabytes * of.megabyte_client / 2
    busy = math.ceil(load.rate * seconds / BUSY)
    partitions = 1
    while (cores := server_cores(load, partitions, max(busy, partitions), of)) > FULL * partitions:
        partitions += max(1, partitions // 50)
    # Partitions are cheap, and what trainers read of each other is not: no more of it than of work.
    work = of.checkpoint_server + load.megabytes * of.megabyte_server
    partitions = max(partitions, math.ceil(load.runs * of.delivery_server / work))
    workers = max(busy, partitions)  # each serves one partition
    cores = server_cores(load, partitions, workers, of)
    entries = min(load.rate * kept.record_ttl_seconds, partitions * Bus.stream_length)
    memory = load.rate * kept.record_ttl_seconds * of.record_memory
    memory += entries * of.entries_memory + load.runs * of.trainer_memory
    memory += load.rate * kept.blob_ttl_seconds * load.megabytes * 2**20
    network = load.runs * of.trainer_bytes + load.rate * (
        of.checkpoint_bytes
        + 2 * load.megabytes * 2**20
        + load.runs / partitions * of.delivery_bytes
    )
    servers = min(partitions, math.ceil(cores / FULL))
    return Size(partitions, servers, workers, cores, memory, network)


def size_report(load: Load, needed: Size) -> str:
    """Both in sentences."""
    return (
        f"{load.runs} runs, {load.rate:.3g} checkpoints/s of {load.megabytes:g} MB and "
        f"{load.analysis:g} s: {needed.workers} workers, {needed.partitions} partitions on "
        f"{needed.servers} servers (busy for {needed.cores:.2g} cores), "
        f"{needed.memory / 2**30:.4g} GB of memory, {needed.network / 2**20:.3g} MB/s"
    )
