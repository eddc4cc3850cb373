"""A real Prometheus that scrapes a run: every panel and every rule finds data.

Runs where ``prometheus`` is installed (Debian's package is enough). Scraped and evaluated every
second in place of ten and thirty; everything else is what deploy/ holds.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from console_server import serving_console
from deployment import BOARD, DEPLOY, RULES, selectors
from redis import Redis
from servers import free_port
from station import Station, WorkerProcess, checkpoint

from elesh.settings import BusSettings, Settings
from leyline import Level, StructuralPruningDecision
from leyline.streams import CHECKPOINTS, DEAD

PROMETHEUS = shutil.which("prometheus")
PATIENCE = 240.0
WORKER = {"observe": {"health_port": 0, "heartbeat_seconds": 0.5}}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not on this machine"),
]


class Prometheus:
    """One that is asked over HTTP."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._address}{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """What an instant query finds, without what is no number."""
        found = [float(each["value"][1]) for each in self.get("query", query=expression)["result"]]
        return [value for value in found if value == value]


@contextmanager
def scraping(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration, on targets of this machine by name of the job."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    jobs = [job["job_name"] for job in config["scrape_configs"]]
    assert jobs == list(targets)
    config["scrape_configs"] = [
        {"job_name": name, "static_configs": [{"targets": [targets[name]]}]} for name in jobs
    ]
    rules = re.sub(r"interval: \d+s", "interval: 1s", (DEPLOY / "prometheus/rules.yml").read_text())
    (folder / "rules.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    except BaseException:
        print((folder / "log").read_text()[-2000:])
        raise
    finally:
        process.terminate()
        process.wait(60)


def until(condition: Callable[[], object], reason: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if condition():
                return
        except OSError:
            pass  # it does not answer yet
        assert time.monotonic() < deadline, reason()
        time.sleep(0.2)


def page_of(worker: WorkerProcess) -> str:
    line = next(line for line in worker.log if " health " in line)
    return re.search(r"url=http://(\S+)", line).group(1)  # type: ignore[union-attr]


def run_with_everything(
    station: Station, worker: WorkerProcess, number: int
) -> StructuralPruningDecision:
    """Analyses, one whose process dies; a cut that is kept and one that is not; a dead letter.

    Returns:
        A decision that no trainer has answered.
    """
    done = len(station.decisions())
    made = [checkpoint(number=10 * number + each, seed=3 * number + each) for each in range(3)]
    station.publish(*made[:2])
    station.wait_decisions(done + 2)
    child, fetched = worker.child, len(station.telemetry("fetched"))
    child.suspend()
    station.publish(made[2])
    station.wait_for(lambda: len(station.telemetry("fetched")) > fetched, "an analysis to begin")
    child.kill()
    kept, open_, lost = station.wait_decisions(done + 3)[-3:]
    station.report(kept, "applied")
    station.report(lost, "rolled_back")
    with Redis.from_url(station.url) as redis:
        redis.xadd(CHECKPOINTS.key(station.partition), {"envelope": b"no envelope"})
    station.wait_for(lambda: len(station.read(DEAD)) == number, "the dead letter")
    return open_


def test_every_panel_and_every_rule_finds_data(station: Station, tmp_path: Path) -> None:
    worker = station.worker(**WORKER)
    settings = Settings(bus=BusSettings(partition=station.partition))
    with serving_console(station.url, settings) as site:
        targets = {
            "elesh-worker": page_of(worker),
            "elesh-console": site.url.removeprefix("http://"),
        }
        with scraping(tmp_path, targets) as prometheus:
            unanswered = run_with_everything(station, worker, 1)
            # What rises later than its first scrape is an increase.
            scraped = "sum(elesh_dead_letters_total) * sum(elesh_outcomes_total{result='applied'})"
            until(lambda: prometheus.values(scraped), lambda: scraped)
            station.report(unanswered, "applied")
            run_with_everything(station, worker, 2)
            station.on_bus(lambda bus: bus.breakers.trip("run", Level.CHANNEL, "by hand"))
            wanted = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
            wanted += [rule["record"] for rule in RULES if "record" in rule]
            wanted += [each for rule in RULES for each in selectors(rule["expr"])]

            def missing() -> list[str]:
                return [query for query in wanted if not prometheus.values(query)]

            until(lambda: not missing(), missing)
            groups = prometheus.get("rules")["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            assert len(rules) == len(RULES)
            assert [rule for rule in rules if rule["health"] != "ok"] == []

            def firing() -> set[str]:
                return {each["labels"]["alertname"] for each in prometheus.get("alerts")["alerts"]}

            until(lambda: firing() >= {"EleshDeadLetters", "EleshBreakerOpen"}, firing)
            removed = prometheus.values("sum(increase(elesh_removed_units_total[1d]))")
            assert removed[0] > 0
