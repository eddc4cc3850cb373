"""What a fenced, idempotent settle costs beside the bare commands that it replaces.

    python -m benchmarks.messaging.commit --messages 2000 --rounds 5

Per message, on the same embedded server and in turns: ``bare`` is redis-py (asyncio) with
XREADGROUP COUNT 1, XADD of the same bytes and XACK, which can lose, double and steal; ``elesh`` is
``claim`` and ``commit``: ownership checked, one decision a key, record stored, the message wrapped
and encoded. ``raw commit`` leaves our encoding out, to tell the price of the scripts from that of
the contract. The fastest round of each counts, since others use this machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from redis.asyncio import Redis

from elesh.bus import Bus, Commit, CommitOutcome, embedded_server
from elesh.settings import BusSettings
from leyline import AnalysisReport, IdempotencyKey, Level, encode, wrap
from leyline.streams import DECISIONS, OUTCOMES

GROUP, NAME = "bench", "w1"
Round = Callable[[Bus, int, int], Awaitable[None]]


def report(number: int) -> AnalysisReport:
    """A small decision."""
    key = IdempotencyKey(number, "0123456789abcdef", "ck-1", Level.PARAMETER)
    return AnalysisReport(
        idempotency_key=str(key), analysed=9, marked=0, error_bound=0.0, confidence=1.0
    )


async def bare(bus: Bus, base: int, count: int) -> None:
    """The three commands alone."""
    redis, source, target = bus._client, OUTCOMES.key(bus.partition), DECISIONS.key(bus.partition)
    body = encode(wrap(report(base), source="bench"))
    for _ in range(count):
        ((_, ((entry, _),)),) = await redis.xreadgroup(GROUP, NAME, {source: ">"}, 1)
        await redis.xadd(target, {"envelope": body})
        await redis.xack(source, GROUP, entry)


async def elesh(bus: Bus, base: int, count: int) -> None:
    """Ours."""
    for number in range(base, base + count):
        (delivery,) = await bus.groups.claim(GROUP, NAME, (OUTCOMES,), count=1, block_seconds=0)
        message = report(number)
        key = IdempotencyKey.parse(message.idempotency_key)
        committed = await bus.commit(GROUP, NAME, delivery, Commit(key, "f", message, {}))
        if committed is not CommitOutcome.COMMITTED:
            raise AssertionError(committed)


async def raw_settle(bus: Bus, base: int, count: int) -> None:
    """Our scripts with bytes that are ready."""
    keys, scripts = bus.keys, bus._scripts
    source, target = OUTCOMES.key(bus.partition), DECISIONS.key(bus.partition)
    body = encode(wrap(report(base), source="bench"))
    dead, latest = keys.named("none"), keys.named("latest", "bench")
    for number in range(base, base + count):
        ((_, ((entry, _),)),) = await scripts.run("claim", [source], [GROUP, NAME, 1])
        record = keys.named("record", f"bench-{number}")
        args = [GROUP, NAME, entry, 3600, "k", "f", -1, 2, "envelope", body]
        await scripts.run("commit", [source, target, dead, record, latest], args)


async def measure(url: str, count: int, rounds: int) -> dict[str, float]:
    """Messages a second of each, the best of ``rounds``."""
    bus = await Bus.connect(url, BusSettings(partition="bench"))
    redis: Redis = bus._client
    body = encode(wrap(report(0), source="bench"))
    contenders: dict[str, Round] = {"bare": bare, "elesh": elesh, "raw settle": raw_settle}
    best = dict.fromkeys(contenders, 0.0)
    for number in range(rounds):
        for name, run in contenders.items():
            await redis.flushall()
            await redis.xgroup_create(OUTCOMES.key("bench"), GROUP, "0", mkstream=True)
            for _ in range(count):
                await redis.xadd(OUTCOMES.key("bench"), {"envelope": body})
            begun = time.perf_counter()
            await run(bus, number * count, count)
            best[name] = max(best[name], count / (time.perf_counter() - begun))
    await bus.close()
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        best = asyncio.run(measure(url, asked.messages, asked.rounds))
    for name, rate in best.items():
        print(f"{name:12}{rate:9.0f} messages/s{rate / best['bare']:8.2f} of bare")


if __name__ == "__main__":
    main()
