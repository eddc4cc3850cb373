"""docker-compose.yml on a real Docker Engine. Opt-in: ``ELESH_TEST_DOCKER=1`` and Docker.

The base images must be there or be pulled: the real ones, or stand-ins under their names
(docs/docker.md says how, and which ones were stand-ins when this was run last).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
pytestmark = [
    pytest.mark.skipif(not os.environ.get("ELESH_TEST_DOCKER"), reason="ELESH_TEST_DOCKER=1"),
    pytest.mark.timeout(3600),
]


def compose(*arguments: str, check: bool = True) -> str:
    """Run docker-compose on the file, without the observability parts."""
    command = ["docker-compose", "-p", "elesh-test", "--env-file", "deploy/core.env", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def containers(service: str) -> list[dict[str, object]]:
    """What the engine says of the containers of a service."""
    ids = compose("ps", "-q", service).split()
    found = subprocess.run(["docker", "inspect", *ids], capture_output=True, check=True)
    return list(json.loads(found.stdout))


def until(condition: Callable[[], bool], reason: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{reason}\n{compose('logs', '--tail=50', check=False)}"
        time.sleep(1)


@pytest.fixture(scope="module", autouse=True)
def up() -> Iterator[None]:
    compose("up", "-d", "--build", "--scale", "worker=2", "redis", "worker", "trainer")
    yield
    compose("down", "-v", "--timeout", "60", check=False)


def test_a_checkpoint_goes_through_and_every_container_is_healthy() -> None:
    def decided() -> bool:
        length = compose("exec", "-T", "redis", "redis-cli", "XLEN", "elesh:{main}:decisions")
        return int(length) >= 3

    until(decided, "three decisions")
    for service, count in (("redis", 1), ("worker", 2)):
        states = [each["State"]["Health"]["Status"] for each in containers(service)]  # type: ignore[index]
        assert len(states) == count
    until(
        lambda: all(
            each["State"]["Health"]["Status"] == "healthy"  # type: ignore[index]
            for service in ("redis", "worker")
            for each in containers(service)
        ),
        "all containers to be healthy",
    )
    shown = compose("exec", "-T", "worker", "elesh", "status")
    assert "Workers: 2 of 2 ready" in shown


def test_workers_are_not_root_and_cannot_write_where_they_live() -> None:
    assert compose("exec", "-T", "worker", "id", "-u").strip() == "10001"
    for place in ("/opt/elesh/x", "/x"):
        wrote = compose("exec", "-T", "worker", "sh", "-c", f"touch {place} || echo no", check=True)
        assert wrote.strip() == "no"


def test_workers_drain_when_they_are_stopped() -> None:
    compose("stop", "worker")
    for each in containers("worker"):
        assert each["State"]["ExitCode"] == 0  # type: ignore[index]
    logs = compose("logs", "--no-color", "worker")
    assert logs.count('"drained"') == 2
