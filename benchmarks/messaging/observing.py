"""What watching costs: decisions per second of one worker with a collector in every condition.

    python -m benchmarks.messaging.observing [--decisions 300] [--rounds 3]

One worker serves checkpoints that are all there before it starts, once for each condition and
round, in turn; the rate is taken from the times at which the decisions stand in the stream. The
conditions: nothing is recorded; spans go into the file; a collector that answers; one that is
absent (the port is closed), refuses (503), or stalls (takes the request and never answers). Rates
are medians over the rounds, and of their ratios to two conditions of the same round: nothing, and a
collector that answers; CPU time is the supervisor's, all its threads, without its start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.pruning.layers import checkpoint
from elesh.bus import Bus, embedded_server
from elesh.settings import BusSettings
from elesh.trainer.session.bus_thread import with_blobs
from leyline import Level
from leyline.streams import CHECKPOINTS, DECISIONS

_LAYERS, _SAMPLES = 8, 32
_CONDITIONS = ("nothing", "file", "answers", "absent", "refuses", "stalls")


@contextmanager
def collector(condition: str) -> Iterator[str]:
    """The URL of a collector that behaves so; empty where there is none."""
    if condition in {"nothing", "file"}:
        yield ""
        return
    if condition == "absent":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        return
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if condition == "stalls":
                ended.wait()
            self.send_response(503 if condition == "refuses" else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


async def publish(url: str, partition: str, count: int) -> None:
    """``count`` checkpoints that differ in nothing but their ids."""
    bus = await Bus.connect(url, BusSettings(partition=partition))
    bundle = replace(checkpoint(_LAYERS, _SAMPLES), levels=(Level.LAYER,))
    # Traced, as a trainer's are: every worker's spans continue somebody's.
    for number in range(count):
        metadata = bundle.metadata.model_copy(update={"checkpoint_id": f"ck-{number}"})
        message = await with_blobs(bus, replace(bundle, metadata=metadata), "")
        carrier = {"traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01"}
        await bus.publish(CHECKPOINTS, message, source="benchmark", carrier=carrier)
    await bus.close()


async def decided(
    url: str, partition: str, count: int, supervisor: psutil.Process
) -> tuple[list[float], float]:
    """When each decision was published, in seconds, and the supervisor's CPU time since the first
    batch of them, in seconds a decision."""
    bus = await Bus.connect(url, BusSettings(partition=partition))
    times: list[float] = []
    last, begun, before = "0", 0, 0.0
    while len(times) < count:
        last, entries = await bus.follow(DECISIONS, last_id=last, block_seconds=5.0)
        times += [int(entry.entry_id.partition("-")[0]) / 1000 for entry in entries]
        if entries and not begun:
            begun, before = len(times), cpu_seconds(supervisor)
    await bus.close()
    return times, (cpu_seconds(supervisor) - before) / max(1, count - begun)


def measured(
    url: str, condition: str, partition: str, count: int, folder: Path
) -> tuple[float, float]:
    """Decisions per second, and the supervisor's CPU milliseconds per decision."""
    asyncio.run(publish(url, partition, count))
    kept = 16 << 20 if condition == "file" else 0
    settings = {
        "bus": {"partition": partition, "lease_seconds": 60.0},
        "observe": {"trace_file_size": kept},
    }
    path = folder / f"{partition}.yaml"
    path.write_text(yaml.safe_dump({"elesh": settings}))
    with collector(condition) as endpoint:
        environment = os.environ | {"ELESH_REDIS_URL": url, "OMP_NUM_THREADS": "1"}
        environment |= {"ELESH_STATE_DIR": str(folder)}
        if endpoint:
            environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        worker = subprocess.Popen(
            [sys.executable, "-m", "elesh.cli", "worker", "--settings", str(path)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        supervisor = psutil.Process(worker.pid)
        found, used = asyncio.run(decided(url, partition, count, supervisor))
        worker.terminate()
        worker.wait()
    return (count - 1) / (found[-1] - found[0]), 1000 * used


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time so far."""
    times_used = process.cpu_times()
    return float(times_used.user + times_used.system)


def main() -> None:
    """Measure every condition in every round, and print the ratios."""
    parser = argparse.ArgumentParser(description="What watching costs.")
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in _CONDITIONS}
    used: dict[str, list[float]] = {name: [] for name in _CONDITIONS}
    with tempfile.TemporaryDirectory() as name, embedded_server(Path(name)) as url:
        for turn in range(chosen.rounds):
            # Each round begins elsewhere, so that no condition always comes first.
            order = (*_CONDITIONS[turn % 6 :], *_CONDITIONS[: turn % 6])
            for condition in order:
                partition = f"{condition}-{turn}"
                rate, cpu = measured(url, condition, partition, chosen.decisions, Path(name))
                rates[condition].append(rate)
                used[condition].append(cpu)
    table = Table(title=f"{chosen.decisions} decisions a run, {chosen.rounds} rounds")
    table.add_column("collector")
    for figure in ("decisions/s", "supervisor ms/decision"):
        for title in (figure, "of 'nothing'", "of 'answers'"):
            table.add_column(title, justify="right")
    for condition in _CONDITIONS:
        table.add_row(condition, *_against(rates, condition), *_against(used, condition))
    Console().print(table)


def _against(figures: dict[str, list[float]], condition: str) -> list[str]:
    """The median, and the medians of the ratios to both bases in the same round."""
    own = figures[condition]
    told = [f"{statistics.median(own):.2f}"]
    for base in ("nothing", "answers"):
        ratios = [a / b for a, b in zip(own, figures[base], strict=True)]
        told.append(f"{statistics.median(ratios):.3f}")
    return told


if __name__ == "__main__":
    main()
