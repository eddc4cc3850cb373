"""A discrete-event model of one partition: how long a decision takes as runs are added.

    python -m benchmarks.scale.model

Checkpoints come at random (Poisson); the server serves one command after the other (a resource of
one), in so many visits a checkpoint, beside what those who wait ask all the time, which makes it
slower by its share; workers compute beside each other; every trainer of the
partition reads the decision, one visit for so many readers. Costs are those of ``sizing.json``,
which ``fit`` makes of ``measured.json``. Answers: the delay that the bus adds to an analysis
(median and 99th percentile), and the knee, from which the server is busy all the time.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy

from elesh.operate.sizing import BUSY, Costs, Load, server_cores

__all__ = ["Delays", "fit", "knee", "simulate"]

MEASURED = Path(__file__).with_name("measured.json")
_VISITS = 12
"""Times that a checkpoint is served on the server, from its publication to its commit."""
_AT_ONCE = 16
"""Readers that are answered before another client has its turn."""


@dataclass(frozen=True)
class Delays:
    """Seconds from publication to the last reader, without the analysis and the wait for a worker
    that is free: what the bus adds."""

    median: float
    p99: float
    busy: float
    """Share of its time that the server was at work."""


def simulate(load: Load, of: Costs, *, events: int = 2000, seed: int = 0) -> Delays:
    """One partition with all of the load's runs, on a node of its own."""
    world, chance = simpy.Environment(), random.Random(seed)
    server = simpy.PriorityResource(world, 1)
    seconds = load.analysis + of.checkpoint_worker + load.megabytes * of.megabyte_client / 2
    workers = simpy.Resource(world, max(1, -(-int(1e6 * load.rate * seconds / BUSY) // 10**6) + 1))
    delays: list[float] = []
    used = [0.0]
    work = of.checkpoint_server + load.megabytes * of.megabyte_server
    waiting = load.runs * of.trainer_server + workers.capacity * of.worker_server

    def served(cost: float) -> Generator[Any, Any, None]:
        with server.request() as turn:
            yield turn
            spent = chance.expovariate(1 / cost)
            used[0] += spent
            yield world.timeout(spent / (1 - min(waiting, 0.99)))

    def checkpoint() -> Generator[Any, Any, None]:
        begun = world.now
        for _ in range(_VISITS // 2):
            yield from served(work / _VISITS)
        asked = world.now
        with workers.request() as turn:
            yield turn
            waited = world.now - asked
            yield world.timeout(seconds)
        for _ in range(_VISITS - _VISITS // 2):
            yield from served(work / _VISITS)
        left = load.runs
        while left > 0:
            now = min(left, _AT_ONCE)
            yield from served(now * of.delivery_server)
            left -= now
        delays.append(world.now - begun - waited - seconds)

    def arrivals() -> Generator[Any, Any, None]:
        for _ in range(events):
            yield world.timeout(chance.expovariate(load.rate))
            world.process(checkpoint())

    world.run(world.process(arrivals()))
    kept = sorted(delays[len(delays) // 5 :])
    p99 = kept[min(len(kept) - 1, int(0.99 * len(kept)))] if kept else float("inf")
    median = statistics.median(kept) if kept else float("inf")
    return Delays(median, p99, used[0] / world.now + waiting)


def knee(of: Costs, interval: float, megabytes: float) -> int:
    """The runs of one partition from which its server is all busy."""
    low, high = 1, 1 << 20
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        load = Load(middle, interval, megabytes)
        low, high = (middle, high) if server_cores(load, 1, 1, of) < 1 else (low, middle)
    return low


def fit(points: dict[str, Any], machine: str) -> Costs:
    """The costs: means over the points where these agree, else of the point that shows most of a
    cost. Of trainers that wait it is the largest, since a process that is starved asks less."""
    alone, many = points["workers"], points["trainers"]
    large = max(points["blobs"], key=lambda point: point["megabytes"])
    most = max(many, key=lambda point: point["trainers"])
    waiting = max(many, key=lambda point: (point["trainers"] > 1, point["idle_server_cpu"]))
    mean = statistics.mean
    return Costs(
        machine=machine,
        checkpoint_server=mean(
            [point["server_cpu"] for point in alone]
            + [cpu for point in points["nodes"] for cpu in point["server_cpu"]]
        ),
        checkpoint_worker=mean(point["worker_cpu"] for point in alone),
        megabyte_server=large["server_cpu"],
        megabyte_client=large["client_cpu"],
        trainer_server=waiting["idle_server_cpu"],
        worker_server=max(point["idle_server_cpu"] for point in alone),
        delivery_server=most["delivery_cpu"],
        checkpoint_bytes=mean(point["sent"] + point["taken"] for point in alone),
        delivery_bytes=most["delivery_bytes"],
        trainer_bytes=waiting["idle_bytes"],
        record_memory=mean(point["record_memory"] for point in alone),
        entries_memory=mean(point["entries_memory"] for point in alone),
        trainer_memory=most["connection_memory"],
    )


def main() -> None:
    """Write ``sizing.json`` from ``measured.json``."""
    import elesh.operate

    points = json.loads(MEASURED.read_text())
    made = fit(points, points["machine"])
    rounded = {
        name: value if isinstance(value, str) else float(f"{value:.3g}")
        for name, value in vars(made).items()
    }
    target = Path(elesh.operate.__file__).with_name("sizing.json")
    target.write_text(json.dumps(rounded, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
