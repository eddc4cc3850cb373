"""What a test needs to run real worker processes on the real server and to talk to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import networks
import psutil
import yaml
from forked import CONSTANTS, Forked

from elesh.bus import Bus, BusUnavailable, Delivery
from elesh.settings import BusSettings
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    Message,
    PruningOutcome,
    StructuralPruningDecision,
    TelemetryEvent,
    read_envelope,
    unwrap,
)
from leyline.streams import CHECKPOINTS, DECISIONS, OUTCOMES, TELEMETRY, Stream

T = TypeVar("T")
PATIENCE = 240.0


class WorkerProcess:
    """One ``elesh worker``; its log is collected."""

    def __init__(self, url: str, settings: Path, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self.log: list[str] = []
        self._serving = threading.Event()
        self.process = Forked(
            ["worker", "--settings", str(settings), "--name", name],
            {"ELESH_REDIS_URL": url, "OMP_NUM_THREADS": "1"} | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if " serving " in line:
                self._serving.set()

    def wait_serving(self) -> WorkerProcess:
        assert self._serving.wait(PATIENCE), "".join(self.log)
        return self

    @property
    def child(self) -> psutil.Process:
        """The compute child."""
        return psutil.Process(self.process.pid).children()[0]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


class Station:
    """A partition of the server: publish to it, read from it, run workers on it."""

    def __init__(self, url: str, partition: str, folder: Path) -> None:
        self.url, self.partition, self.folder = url, partition, folder
        self.workers: list[WorkerProcess] = []

    def settings_file(self, **sections: dict[str, Any]) -> Path:
        bus = {"partition": self.partition, "lease_seconds": 2.0} | sections.pop("bus", {})
        shift = {"channel_analysis": {"max_predicted_shift": 1e9}}
        values = {"bus": bus, "structured_pruning": shift, **sections}
        path = self.folder / f"settings-{len(self.workers)}.yaml"
        path.write_text(yaml.safe_dump({"elesh": values}))
        return path

    def worker(
        self,
        environment: dict[str, str] | None = None,
        constants: dict[str, Any] | None = None,
        **sections: Any,
    ) -> WorkerProcess:
        """A worker that serves; keywords are sections of its settings, ``constants`` those of
        modules below ``elesh.worker``."""
        name = f"w{len(self.workers) + 1}"
        path = self.settings_file(**sections)
        # Most tests measure nothing: their workers need no torch, and many of them start.
        given = {"executor.PRELOAD": False} | (constants or {})
        text = json.dumps({f"elesh.worker.{place}": value for place, value in given.items()})
        worker = WorkerProcess(self.url, path, name, {CONSTANTS: text} | (environment or {}))
        self.workers.append(worker)
        return worker.wait_serving()

    def on_bus(self, action: Callable[[Bus], Awaitable[T]]) -> T:
        async def run() -> T:
            bus = await Bus.connect(self.url, BusSettings(partition=self.partition))
            try:
                return await action(bus)
            finally:
                await bus.close()

        return asyncio.run(run())

    def publish(self, *bundles: CheckpointBundle, times: int = 1) -> list[str]:
        """Publish checkpoints as a trainer does, each ``times`` times as events of their own."""

        async def action(bus: Bus) -> list[str]:
            ids = []
            for bundle in bundles:
                event = await ready(bus, bundle)
                ids += [await send(bus, CHECKPOINTS, event) for _ in range(times)]
            return ids

        return self.on_bus(action)

    def report(self, decision: StructuralPruningDecision, result: str, **more: Any) -> None:
        """Say, as a trainer does, what became of a decision."""
        outcome = PruningOutcome.model_validate(
            {
                "idempotency_key": decision.idempotency_key,
                "run_id": "run",
                "epoch": decision.epoch,
                "result": result,
                **more,
            }
        )
        self.on_bus(lambda bus: send(bus, OUTCOMES, outcome))

    def read(self, stream: Stream) -> list[Delivery]:
        return self.on_bus(lambda bus: bus.read(stream))

    def messages(self, stream: Stream) -> list[Message]:
        return [unwrap(read_envelope(delivery.envelope)) for delivery in self.read(stream)]

    def decisions(self) -> list[StructuralPruningDecision]:
        return [m for m in self.messages(DECISIONS) if isinstance(m, StructuralPruningDecision)]

    def telemetry(self, step: str = "") -> list[TelemetryEvent]:
        events = [m for m in self.messages(TELEMETRY) if isinstance(m, TelemetryEvent)]
        return [event for event in events if not step or event.step == step]

    def wait_for(self, what: Callable[[], T], reason: str, patience: float = PATIENCE) -> T:
        """The first true answer of ``what``; polls, since the thing happens in other processes:
        the longer it takes, the more seldom, for those processes' sake. A server of a loaded
        machine that does not answer in time is asked again."""
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < patience:
            with contextlib.suppress(BusUnavailable):
                if found := what():
                    return found
            time.sleep(min(0.05 + waited / 20, 0.5))
        logs = "".join(f"--- {w.name}\n{''.join(w.log)}" for w in self.workers)
        raise AssertionError(f"waited in vain for {reason}\n{logs}")

    def wait_decisions(self, count: int) -> list[StructuralPruningDecision]:
        """So many decisions, and what telemetry says of them, which comes after them."""

        def enough() -> list[StructuralPruningDecision]:
            found = self.decisions()
            if len(found) < count:
                return []
            told = {event.idempotency_key for event in self.telemetry("settled")}
            return found if told >= {decision.idempotency_key for decision in found} else []

        return self.wait_for(enough, f"{count} decisions")


def faulty(station: Station, fault: str, when: str = "full", **sections: Any) -> WorkerProcess:
    """A worker whose compute child has a fault: see ``faults/sitecustomize.py``."""
    faults = str(Path(__file__).parent / "faults")
    paths = os.pathsep.join(filter(None, (faults, os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": paths, "ELESH_FAULT": fault, "ELESH_FAULT_WHEN": when}
    return station.worker(environment, **sections)


async def ready(bus: Bus, bundle: CheckpointBundle) -> CheckpointReady:
    """Put the blobs of a bundle and return its event."""
    refs: dict[str, Any] = {}
    for name, data in bundle.blobs().items():
        refs[name] = await bus.blobs.put(data)
    return CheckpointReady(
        metadata=bundle.metadata,
        architecture=bundle.architecture,
        levels=bundle.levels,
        **refs,
    )


async def send(bus: Bus, stream: Stream, message: Message) -> str:
    run_id = getattr(getattr(message, "metadata", None) or message, "run_id", "") or "run"
    return await bus.publish(stream, message, source="test", run_id=run_id)


def checkpoint(epoch: int = 60, *, seed: int = 0, number: int = 1) -> CheckpointBundle:
    """A small checkpoint in a phase that prunes; ``number`` makes its key its own."""
    architecture = networks.chain([40, 48, 32])
    made = networks.bundle(architecture, epoch=epoch, seed=seed)
    metadata = made.metadata.model_copy(update={"checkpoint_id": f"ck-{number}"})
    return CheckpointBundle(metadata, architecture, made.channels, made.gates)
