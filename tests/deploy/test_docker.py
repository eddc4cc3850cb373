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
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
SERVICES = ("redis", "worker", "trainer", "console", "prometheus")
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
    compose("up", "-d", "--build", "--scale", "worker=2", *SERVICES)
    yield
    compose("down", "-v", "--timeout", "60", check=False)


def test_a_checkpoint_goes_through_and_every_container_is_healthy() -> None:
    def decided() -> bool:
        length = compose("exec", "-T", "redis", "redis-cli", "XLEN", "elesh:{main}:decisions")
        return int(length) >= 3

    until(decided, "three decisions")
    checked = {"redis": 1, "worker": 2, "console": 1, "prometheus": 1}
    for service, count in checked.items():
        assert len(containers(service)) == count
    until(
        lambda: all(
            each["State"]["Health"]["Status"] == "healthy"  # type: ignore[index]
            for service in checked
            for each in containers(service)
        ),
        "all containers to be healthy",
    )
    shown = compose("exec", "-T", "worker", "elesh", "status")
    assert "Workers: 2 of 2 ready" in shown


def test_the_console_shows_the_run() -> None:
    with urlopen("http://127.0.0.1:8765/", timeout=10) as page:
        assert "demo-" in page.read().decode()


def test_prometheus_scrapes_every_worker() -> None:
    def scraped() -> bool:
        address = "http://127.0.0.1:9090/api/v1/query?query=sum(elesh_ready)"
        with urlopen(address, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
        return bool(result) and result[0]["value"][1] == "2"

    until(scraped, "both workers to be scraped")


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
