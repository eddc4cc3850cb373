"""A server that refuses under a training run: training goes on, and all is decided afterwards.

``ELESH_OUTAGE_SECONDS`` lengthens the outage, for a run by hand (docs/benchmarks-costs.md).
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from servers import PATIENCE, Server
from station import Station, checkpoint

from elesh.settings import BusSettings, Settings
from elesh.trainer import Session

SECONDS = float(os.environ.get("ELESH_OUTAGE_SECONDS", "3"))
ASIDE = max(1.5, SECONDS / 2)
"""Seconds of training before and after it, to compare with."""
_EVERY = 100
"""Steps between two checkpoints."""
OUTAGES: dict[str, tuple[Callable[[Redis], object], Callable[[Redis], object]]] = {
    "full": (
        lambda redis: redis.config_set("maxmemory", "1mb"),
        lambda redis: redis.config_set("maxmemory", "0"),
    ),
    "read-only": (
        lambda redis: redis.replicaof("127.0.0.1", "1"),
        lambda redis: redis.replicaof("NO", "ONE"),
    ),
    "without replicas": (
        lambda redis: redis.config_set("min-replicas-to-write", "1"),
        lambda redis: redis.config_set("min-replicas-to-write", "0"),
    ),
}


@dataclass(frozen=True)
class Window:
    """A while of training, step by step."""

    cpu: list[float]
    """CPU seconds of the training thread, Elesh's calls included: how fast training is, whoever
    else uses the machine."""
    calls: list[float]
    """Seconds of Elesh's calls by the clock."""


@dataclass
class Training:
    """Steps that compute a little, and what Elesh's calls took of their thread."""

    session: Session
    asked: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)
    steps: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.eye(256))

    def run(self, seconds: float) -> Window:
        """Train for so long."""
        begun, cpu, calls = time.monotonic(), [], []
        while time.monotonic() - begun < seconds:
            self.steps += 1
            due = self.steps % _EVERY == 0
            bundle = checkpoint(number=self.steps) if due else None
            before = time.thread_time()
            self.weights = np.tanh(self.weights @ self.weights.T)
            called = time.monotonic()
            if bundle is not None and self.session.publish(bundle):
                self.asked.add(str(bundle.decision_key))
            self.listen()
            calls.append(time.monotonic() - called)
            cpu.append(time.thread_time() - before)
            time.sleep(0.01)
        return Window(cpu, calls)

    def listen(self) -> None:
        self.heard.update(decision.idempotency_key for decision in self.session.decisions())


class Lines(logging.Handler):
    """What is logged for Elesh."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTAGES)
def test_training_goes_on_and_everything_is_decided_after_the_outage(
    tmp_path: Path, kind: str
) -> None:
    begin, end = OUTAGES[kind]
    with Server(tmp_path / "server") as server:
        station = Station(server.url, "training", tmp_path)
        worker, lines = station.worker(), Lines()
        logging.getLogger("elesh").addHandler(lines)
        try:
            settings = Settings(bus=BusSettings(partition="training"))
            with Session("run", server.url, settings) as session:
                assert session.wait_connected(PATIENCE)
                training = Training(session)
                usual = training.run(ASIDE)
                said, logged = lines.count, len(worker.log)
                with server.client() as redis:
                    begin(redis)
                    during = training.run(SECONDS)
                    end(redis)
                over = time.monotonic()
                while training.heard < training.asked and time.monotonic() < over + PATIENCE:
                    session.wait(0.2)
                    training.listen()
                back = time.monotonic() - over
                said, logged = lines.count - said, len(worker.log) - logged
                left, asked = training.asked - training.heard, len(training.asked)
                # Beside the time before the outage also that after it: a machine drifts.
                cpu = usual.cpu + training.run(ASIDE).cpu
                speed = statistics.fmean(cpu) / statistics.fmean(during.cpu)
                typical = statistics.median(cpu) / statistics.median(during.cpu)
                calls = statistics.median(during.calls)
                print(
                    f"{kind} for {SECONDS:.0f} s: steps a CPU second {speed:.3f} of those before "
                    f"and after (of the median step {typical:.3f}), Elesh's calls "
                    f"{1e6 * calls:.0f} us; {said} lines of the trainer, "
                    f"{logged} of the worker; {asked} checkpoints, decided "
                    f"{back:.1f} s after it"
                )
                assert not left, session.failed
                assert said + sum("cannot serve" in line for line in worker.log) <= 20
                assert calls < 0.1, "publishing and listening wait for nothing"
        finally:
            logging.getLogger("elesh").removeHandler(lines)
            worker.process.kill()
