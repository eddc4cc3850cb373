"""The console with a thousand runs and ten thousand decisions: pages, polls, memory, the report.

    python -m benchmarks.console.at_size --runs 1000 --decisions 10000

Fills an embedded server's streams with runs that look like real ones (a checkpoint, a decision and
an outcome at each), serves the console in its own process, and asks as browsers do. Server time
is from the request to the last byte, on the same machine; where others use it too, the console's
own CPU seconds say more. ``--fill URL`` only fills that server, to look at the pages by eye.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from contracts import examples
from elesh.bus import embedded_server
from leyline import (
    ChannelPruningTarget,
    CheckpointReady,
    GateResult,
    Message,
    PruningGroup,
    PruningOutcome,
    StructuralPruningDecision,
    encode,
    wrap,
)
from leyline.streams import CHECKPOINTS, DECISIONS, OUTCOMES, Stream

PARTITION = "main"
WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)
REASONS = (
    "predicted output change 0.14 is over the limit 0.10 (moderate phase)",
    "no unit is cheap enough: the cheapest would raise the loss by 0.031",
    "preparation phase: nothing is removed before epoch 8",
)
_TEMPLATES = 20
"""Runs that differ; the others are these under other names."""
Entries = Iterator[tuple[Stream, Message, str]]


def run_of(name: str, decisions: int, rng: np.random.Generator) -> Entries:
    """A run: checkpoints, what was decided on them, and what its trainer made of that."""
    ready = examples.MESSAGES["CheckpointReady"]
    decided = examples.MESSAGES["StructuralPruningDecision"]
    assert isinstance(ready, CheckpointReady)
    assert isinstance(decided, StructuralPruningDecision)
    sizes, accuracy = list(WIDTHS), 0.55
    template = ready.architecture.groups[0]
    for epoch in range(1, decisions + 1):
        accuracy += (0.98 - accuracy) * 0.35
        seen = float(min(1.0, accuracy + rng.normal(0, 0.002)))
        groups = tuple(
            PruningGroup.model_construct(
                **template.model_dump()
                | {
                    "name": f"layer{number // 2 + 1}.{number % 2}.conv1",
                    "original_size": original,
                    "origin": tuple(range(size)),
                    "slices": template.slices,
                    "sites": template.sites,
                }
            )
            for number, (original, size) in enumerate(zip(WIDTHS, sizes, strict=True))
        )
        metadata = ready.metadata.model_copy(
            update={
                "run_id": name,
                "epoch": epoch,
                "checkpoint_id": f"{name}-{epoch}",
                "accuracy": seen,
                "loss": 0.9 * (1 - seen),
            }
        )
        yield (
            CHECKPOINTS,
            ready.model_copy(
                update={
                    "metadata": metadata,
                    "architecture": ready.architecture.model_copy(update={"groups": groups}),
                }
            ),
            name,
        )
        key = f"{epoch}:{metadata.model_hash}:{name}-{epoch}:channel"
        approved = bool(epoch > 2 and rng.random() < 0.6)
        place = int(rng.integers(len(sizes)))
        count = int(rng.integers(1, max(2, sizes[place] // 6))) if approved else 0
        units = tuple(sorted(rng.choice(sizes[place], count, replace=False).tolist()))
        target = ChannelPruningTarget(
            layer_name=groups[place].name,
            channel_indices=units,
            original_indices=units,
            importance=(0.01,) * count,
            channels_before=sizes[place],
            channels_after=sizes[place] - count,
        ) if count else None  # fmt: skip
        failed = GateResult(
            name="predicted_output_change", passed=approved, measured=0.14, limit=0.1
        )
        yield (
            DECISIONS,
            decided.model_copy(
                update={
                    "idempotency_key": key,
                    "run_id": name,
                    "epoch": epoch,
                    "channels": (target,) if target else (),
                    "approved_for_application": approved,
                    "rejection_reason": "" if approved else REASONS[epoch % len(REASONS)],
                    "safety": decided.safety.model_copy(
                        update={"gates": (*decided.safety.gates, failed)}
                    ),
                }
            ),
            name,
        )
        result = ("rolled_back" if rng.random() < 0.05 else "applied") if approved else "rejected"
        yield (
            OUTCOMES,
            PruningOutcome(
                idempotency_key=key,
                run_id=name,
                epoch=epoch,
                result=result,
                accuracy_before=seen,
                accuracy_masked=seen - 0.003,
                accuracy_after=seen - 0.001 if approved else None,
                parameters_before=119,
                parameters_after=110,
                detail="" if approved else REASONS[epoch % len(REASONS)],
            ),
            name,
        )
        if result == "applied":
            sizes[place] -= count


def fill(url: str, runs: int, decisions: int) -> None:
    """Write the runs, side by side as a team's are: a few different ones under many names."""
    rng = np.random.default_rng(7)
    each = max(1, decisions // runs)
    templates = [[*_encoded(run_of(_name(n), each, rng), _name(n))] for n in range(_TEMPLATES)]
    with Redis.from_url(url) as client:
        for step in range(3 * each):
            pipe = client.pipeline(transaction=False)
            for number in range(runs):
                stream, key, envelope = templates[number % _TEMPLATES][step]
                old, new = _name(number % _TEMPLATES), _name(number)
                # Names are of one length, so that the bytes stay an envelope.
                framed = envelope.replace(old.encode(), new.encode())
                pipe.xadd(f"elesh:{{{PARTITION}}}:{stream}", {"envelope": framed})
                if key:
                    record = f"elesh:{{{PARTITION}}}:record:{key.replace(old, new)}"
                    known = {"fingerprint": "0" * 64, "envelope": framed, "decided_at": time.time()}
                    pipe.hset(record, mapping=known)
            pipe.execute()


def _name(number: int) -> str:
    return f"run-{number:04}"


def _encoded(entries: Entries, run_id: str) -> Iterator[tuple[str, str, bytes]]:
    """Stream, the key of a decision (empty for others) and envelope of each entry."""
    for stream, message, _ in entries:
        decided = isinstance(message, StructuralPruningDecision)
        key = message.idempotency_key if decided else ""
        envelope = wrap(
            message, source="benchmark", run_id=run_id, correlation_id=key, now=datetime.now(UTC)
        )
        yield stream.name, key, encode(envelope)


class Client:
    """A browser's side: pages whole, then what changed."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def get(self, path: str, **headers: str) -> tuple[int, bytes, int, float]:
        """Status, body, bytes on the wire, seconds."""
        sent = {"Accept-Encoding": "gzip"} | {k.replace("_", "-"): v for k, v in headers.items()}
        begun = time.perf_counter()
        self._connection.request("GET", path, headers=sent)
        reply = self._connection.getresponse()
        data = reply.read()
        took = time.perf_counter() - begun
        body = gzip.decompress(data) if reply.headers.get("Content-Encoding") == "gzip" else data
        return reply.status, body, len(data), took

    def poll(self, path: str, page: bytes) -> tuple[int, int, float]:
        """Status, bytes and seconds of what an open page asks."""
        text = page.decode()
        live = re.search(r'data-live="([^"]+)"', text)
        parts = re.findall(r'id="(part-[^"]+)" data-hash="([^"]+)"', text)
        known = " ".join(f"{name}={digest}" for name, digest in parts)
        status, _, size, took = self.get(
            path, Elesh_Live=live[1] if live else "none", Elesh_Parts=known
        )
        return status, size, took


@contextmanager
def console(url: str) -> Iterator[tuple[int, int]]:
    """A console in a process of its own: its port and process id."""
    command = [sys.executable, "-m", "elesh.cli", "console", "--port", "0"]
    environment = os.environ | {"ELESH_REDIS_URL": url}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        try:
            yield int(told.rsplit(":", 1)[1]), process.pid
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(url: str, idle_seconds: float) -> dict[str, Any]:
    """Figures of a console on a server that was filled."""
    with console(url) as (port, pid):
        client = Client(port)
        found: dict[str, Any] = {"started_mib": resident(pid) / 2**20}
        before = cpu_seconds(pid)
        status, page, size, took = client.get("/")
        assert status == 200, page
        cpu = cpu_seconds(pid) - before
        found["first_page"] = {"seconds": took, "cpu_seconds": cpu, "bytes": size}
        begun, before = time.perf_counter(), cpu_seconds(pid)
        while b"still being read" in client.get("/fleet")[1]:
            time.sleep(1.0)
        found["all_read"] = {
            "seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds(pid) - before,
        }  # fmt: skip
        found["resident_mib"] = resident(pid) / 2**20
        decisions = client.get("/decisions")[1]
        keys = re.findall(rb"/decisions/([^\"]+)", decisions)
        pages = {
            "overview": "/",
            "runs of a search": "/?text=run-00",
            "oldest runs": "/?page=20",
            "run": "/runs/run-0500",
            "decisions": "/decisions",
            "decisions filtered": "/decisions?outcome=rolled_back&level=channel&first=5",
            "oldest decisions": "/decisions?page=200",
            "decision": f"/decisions/{keys[0].decode()}" if keys else "/decisions",
            "compare": "/compare?a=run-0001&b=run-0002",
            "fleet": "/fleet",
            "dead": "/dead",
            "audit": "/audit",
        }
        found["pages"] = {}
        for name, path in pages.items():
            client.get(path)  # templates are compiled once
            before = cpu_seconds(pid)
            status, page, size, took = client.get(path)
            cpu = cpu_seconds(pid) - before
            assert status == 200, (path, page[:300])
            polled, bytes_, poll_took = client.poll(path, page)
            found["pages"][name] = {
                "seconds": took,
                "cpu_seconds": cpu,
                "bytes": size,
                "poll_status": polled,
                "poll_bytes": bytes_,
                "poll_seconds": poll_took,
            }
        page = client.get("/")[1]
        before, begun, bytes_ = cpu_seconds(pid), time.perf_counter(), 0
        while time.perf_counter() - begun < idle_seconds:
            bytes_ = max(bytes_, client.poll("/", page)[1])
            time.sleep(2.0)
        share = (cpu_seconds(pid) - before) / (time.perf_counter() - begun)
        found["idle_tab"] = {"core": share, "largest_poll_bytes": bytes_}
    return found


async def report_of(url: str, run_id: str) -> dict[str, float]:
    """Seconds and bytes of the report of the oldest run."""
    from elesh.bus import Bus
    from elesh.console.export import report_html
    from elesh.settings import Settings

    settings = Settings()
    bus = await Bus.connect(url, settings.bus)
    try:
        begun = time.perf_counter()
        text, decisions = await report_html(bus, settings, run_id)
        took = time.perf_counter() - begun
    finally:
        await bus.close()
    return {"seconds": took, "bytes": len(text.encode()), "decisions": decisions}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--decisions", type=int, default=10000)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of an idle tab")
    parser.add_argument("--fill", default="", help="only fill the server at this URL")
    asked = parser.parse_args()
    if asked.fill:
        fill(asked.fill, asked.runs, asked.decisions)
        return
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as url:
        fill(url, asked.runs, asked.decisions)
        found = measure(url, asked.idle)
        found["report"] = asyncio.run(report_of(url, "run-0000"))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
