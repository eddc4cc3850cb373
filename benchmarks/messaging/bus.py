"""The bus beside its peers, blobs beside plain reads, and what an idle worker asks of the server.

    python -m benchmarks.messaging.bus --peers peers/bin/python --messages 3000 --rounds 3

One server for all, the peers (``benchmarks/constraints-peers.txt``) in an environment of their own,
each serving the same number of no-op jobs in one process; they take turns, and the fastest round of
each counts, since others use this machine, too. Elesh's no-op goes the worker's way: claimed, its
envelope checked, settled with fence and idempotency record, the decision published. That has
neither telemetry nor spans nor an analysis in it, as the peers have none. ``commit`` alone, beside
bare redis-py, is ``benchmarks.messaging.commit``; two workers beside one are
``benchmarks.messaging.fleet``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from redis.asyncio import Redis

from elesh.bus import Bus, Commit, CommitOutcome, Delivery, embedded_server
from elesh.bus.state.blobs import CHUNK
from elesh.settings import BusSettings
from leyline import (
    AnalysisReport,
    BlobRef,
    IdempotencyKey,
    Level,
    PruningOutcome,
    read_envelope,
    unwrap,
)
from leyline.streams import OUTCOMES

GROUP, NAME = "bench", "w1"
PEERS = ("faststream", "pydocket", "taskiq-redis", "arq", "dramatiq")
BLOB = 256 << 20


Rate = tuple[float, float]
"""Messages a second, and messages a second of the process's own CPU time: the second is steadier
where others use the machine, too; the server's part is not in it."""


async def elesh(url: str, count: int, batch: int) -> Rate:
    """Our own no-ops, from the first claim to the last settlement."""
    bus = await Bus.connect(url, BusSettings(partition="bench"))
    for number in range(count):
        outcome = PruningOutcome(
            idempotency_key=str(_key(number)), run_id="bench", epoch=number, result="applied"
        )
        await bus.publish(OUTCOMES, outcome, source="bench")
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < count:
        claimed = await bus.groups.claim(GROUP, NAME, (OUTCOMES,), count=batch, block_seconds=1)
        await asyncio.gather(*(_no_op(bus, delivery) for delivery in claimed))
        done += len(claimed)
    rate = count / (time.perf_counter() - begun), count / (time.process_time() - cpu)
    await bus.close()
    return rate


async def _no_op(bus: Bus, delivery: Delivery) -> None:
    message = unwrap(read_envelope(delivery.envelope))
    assert isinstance(message, PruningOutcome)
    key = IdempotencyKey.parse(message.idempotency_key)
    report = AnalysisReport(
        idempotency_key=str(key), analysed=0, marked=0, error_bound=0.0, confidence=1.0
    )
    committing = Commit(key, "f", report, delivery.carrier)
    committed = await bus.commit(GROUP, NAME, delivery, committing)
    if committed != [CommitOutcome.COMMITTED]:
        raise AssertionError(committed)


def _key(number: int) -> IdempotencyKey:
    return IdempotencyKey(number, "0123456789abcdef", "bench", Level.PARAMETER)


def peer(python: str, name: str, url: str, count: int) -> Rate:
    """A peer's."""
    done = subprocess.run(
        [python, "-m", "benchmarks.messaging.peers", name, url, str(count)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return count / float(figures["seconds"]), count / float(figures["cpu"])


async def side_by_side(url: str, count: int, rounds: int, python: str, batch: int) -> None:
    """Print the rates."""
    contenders = ["elesh", *(PEERS if python else ())]
    best: dict[str, Rate] = dict.fromkeys(contenders, (0.0, 0.0))
    async with Redis.from_url(url) as redis:
        for _ in range(rounds):
            for name in contenders:
                await redis.flushall()
                rate = (
                    await elesh(url, count, batch)
                    if name == "elesh"
                    else await asyncio.to_thread(peer, python, name, url, count)
                )
                best[name] = max(best[name][0], rate[0]), max(best[name][1], rate[1])
                print(f"{name}: {rate[0]:.0f}, {rate[1]:.0f}", file=sys.stderr, flush=True)
        await redis.flushall()
    print("                messages/s   elesh is    a CPU second   elesh is")
    for name, rate in best.items():
        ratios = [ours / theirs for ours, theirs in zip(best["elesh"], rate, strict=True)]
        told = zip(rate, ratios, strict=True)
        print(f"{name:14}" + "".join(f"{each:12.0f}{ratio:9.2f} x  " for each, ratio in told))


async def blob(url: str) -> None:
    """A 256 MB blob against GETRANGE of the same bytes, and what another client feels."""
    bus = await Bus.connect(url, BusSettings(partition="bench"))
    ref = await bus.blobs.put(os.urandom(BLOB), "raw")
    redis = bus._client
    head = f"elesh:{{bench}}:blob:{ref.sha256}"
    for number in range(ref.size // CHUNK):
        await redis.append("whole", await redis.get(f"{head}:{number}"))
    plain, ours = float("inf"), float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        for start in range(0, BLOB, CHUNK):
            await redis.getrange("whole", start, start + CHUNK - 1)
        plain = min(plain, time.perf_counter() - begun)
        begun = time.perf_counter()
        assert len(await bus.blobs.get(ref)) == BLOB
        ours = min(ours, time.perf_counter() - begun)
    await redis.delete("whole")
    rate, share = BLOB / ours / 1e6, plain / ours
    print(f"blob: {rate:.0f} MB/s fetched and verified, {share:.2f} of GETRANGE")
    alone, meanwhile = await _pings(url, ref, 0), await _pings(url, ref, 3)
    print(f"blob: another client's PING p99 {meanwhile:.1f} ms meanwhile, {alone:.1f} ms without")
    rss = await asyncio.to_thread(_memory, url, ref)
    print(f"blob: highest RSS of a process that fetches it, over one that does not: {rss >> 20} MB")
    await bus.close()


async def _pings(url: str, ref: BlobRef, times: int) -> float:
    """p99 in milliseconds of PINGs while another process fetches the blob so many times."""
    code = (
        "import asyncio, sys, time; from benchmarks.messaging.bus import fetch; "
        "asyncio.run(fetch(*sys.argv[1:3], int(sys.argv[3]))); time.sleep(2)"
    )
    fetching = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, url, ref.model_dump_json(), str(times)
    )
    waits = []
    async with Redis.from_url(url) as redis:
        while fetching.returncode is None:
            begun = time.perf_counter()
            await redis.ping()
            waits.append(1000 * (time.perf_counter() - begun))
            await asyncio.sleep(0.002)
    return sorted(waits)[int(0.99 * (len(waits) - 1))]


async def fetch(url: str, ref: str, times: int) -> None:
    """Get a blob and forget it."""
    bus = await Bus.connect(url, BusSettings(partition="bench"))
    for _ in range(times):
        await bus.blobs.get(BlobRef.model_validate_json(ref))
    await bus.close()


def _memory(url: str, ref: BlobRef) -> int:
    """Bytes of RSS that fetching a blob takes on top of a process that only connects."""
    # VmHWM, not ru_maxrss: that one begins with the parent's memory.
    code = (
        "import asyncio, re, sys\nfrom benchmarks.messaging.bus import fetch\n"
        "asyncio.run(fetch(sys.argv[1], sys.argv[2], int(sys.argv[3])))\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, url, ref.model_dump_json(), times],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for times in ("0", "1")
    ]  # fmt: skip
    return (peaks[1] - peaks[0]) * 1024


async def idle(url: str, seconds: float) -> None:
    """Commands a second that an idle worker sends."""
    environment = os.environ | {"ELESH_REDIS_URL": url, "ELESH_BUS__PARTITION": "idle"}
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "elesh.cli", "worker", env=environment, stderr=subprocess.PIPE
    )
    assert worker.stderr is not None
    while b" serving " not in await worker.stderr.readline():
        pass
    await asyncio.sleep(5)
    sent: Counter[str] = Counter()
    async with Redis.from_url(url) as redis, redis.monitor() as monitor:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    command = await monitor.next_command()
                    if command["client_type"] != "lua":  # what scripts call is no traffic
                        sent[command["command"].split()[0].upper()] += 1
    worker.terminate()
    await worker.wait()
    print(f"idle worker: {sent.total() / seconds:.2f} commands/s, {dict(sent)} in {seconds:g} s")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=10, help="entries claimed and settled at once")
    parser.add_argument("--peers", default="", help="a Python that has the peers; empty: no peers")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to watch an idle worker")
    parser.add_argument("--only", choices=["peers", "blob", "idle"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        if asked.only in (None, "peers"):
            asyncio.run(side_by_side(url, asked.messages, asked.rounds, asked.peers, asked.batch))
        if asked.only in (None, "blob"):
            asyncio.run(blob(url))
        if asked.only in (None, "idle"):
            asyncio.run(idle(url, asked.idle))


if __name__ == "__main__":
    main()
