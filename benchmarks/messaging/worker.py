"""What a whole worker spends on a checkpoint beside its analysis.

    python -m benchmarks.messaging.worker --checkpoints 500 --runs 64 --rounds 3

The real worker on an embedded server, in this process, with a compute child that answers at once
what was decided before: the rest is as ever, claim, signature, schema, admission, lease, blobs, the
run's state, log, telemetry, metrics, breaker, settlement. Checkpoints of one run are served one
after the other, those of different runs side by side: with ``--runs 1`` entry by entry.
``benchmarks.messaging.bus`` has the bus alone beside its peers, which do none of this. The fastest
round counts, since others use this machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.messaging.fleet import checkpoint
from elesh import analyze
from elesh.bus import Bus, embedded_server
from elesh.settings import BusSettings, Settings
from elesh.worker import Worker
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import Job, Reply
from leyline import CheckpointReady, Priority, encode
from leyline.streams import CHECKPOINTS, DECISIONS

_WIDTH = 256


async def served(url: str, partition: str, count: int, runs: int) -> tuple[float, float]:
    """Checkpoints a second from the first decision to the last, and those a CPU second."""
    settings = Settings(bus=BusSettings(partition=partition))
    bus = await Bus.connect(url, settings.bus)
    bundle = checkpoint(0, _WIDTH)
    decision = analyze(bundle, settings=settings)
    statistics = await bus.blobs.put(bundle.blobs()["statistics"])
    for number in range(count + 1):
        names = {"checkpoint_id": f"ck-{number}", "run_id": f"run-{number % runs}"}
        named = bundle.metadata.model_copy(update=names)
        event = CheckpointReady(
            metadata=named, architecture=bundle.architecture, statistics=statistics
        )
        await bus.publish(CHECKPOINTS, event, source="bench", priority=Priority.EMERGENCY)

    async def known(_: ComputeChild, job: Job, *, timeout: float) -> Reply:
        return Reply(encode(decision.model_copy(update={"idempotency_key": job.key})))

    with patch.object(ComputeChild, "run", known):
        worker = Worker(bus, settings, "w1")
        running = asyncio.create_task(worker.run())
        last, decided = "0", 0
        begun = cpu = 0.0
        while decided <= count:
            last, more = await bus.follow(DECISIONS, last_id=last, block_seconds=2)
            if not decided and more:
                begun, cpu = time.perf_counter(), time.process_time()
            decided += len(more)
        rates = count / (time.perf_counter() - begun), count / (time.process_time() - cpu)
        worker.drain()
        await running
    await bus.close()
    return rates


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        rounds = [
            asyncio.run(served(url, f"bench-{number}", asked.checkpoints, asked.runs))
            for number in range(asked.rounds)
        ]
    wall, cpu = (max(rates) for rates in zip(*rounds, strict=True))
    print(f"whole worker, no-op analysis: {wall:.0f} checkpoints/s, {cpu:.0f} a CPU second")


if __name__ == "__main__":
    main()
