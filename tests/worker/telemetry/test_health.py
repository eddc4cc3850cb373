"""A worker's health is the truth while its child is busy, wedged or dead; no metric is missing."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from collector import collecting
from deployment import named_metrics
from prometheus_client.parser import text_string_to_metric_families
from station import Station, WorkerProcess, checkpoint

from elesh.bus import WorkerState
from elesh.worker.compute.protocol import HeartbeatReader

HEALTH = {"observe": {"health_port": 0, "heartbeat_seconds": 0.5}}


class Pages:
    """The pages of one worker."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        line = next(line for line in worker.log if " health " in line)
        self.url = re.search(r"url=(\S+)", line).group(1)  # type: ignore[union-attr]

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ready(self) -> tuple[int, dict[str, Any]]:
        code, body = self.get("/ready")
        return code, json.loads(body)

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found


def states(station: Station) -> list[WorkerState]:
    return station.on_bus(lambda bus: bus.registry.workers())


@pytest.mark.slow
def test_a_wedged_child_turns_readiness_red_and_nothing_is_lost(station: Station) -> None:
    worker = station.worker(**HEALTH)
    pages = Pages(worker)
    station.wait_for(lambda: pages.ready()[0] == 200, "readiness")
    child = worker.child
    child.suspend()
    station.publish(checkpoint())
    station.wait_for(lambda: pages.ready()[0] == 503, "readiness to turn red")
    _, page = pages.ready()
    assert page["child"] == "wedged"
    assert f"(pid {child.pid}) is stopped" in page["why"]
    assert pages.get("/live")[0] == 200
    code, body = pages.get(f"/health/elesh/{worker.name}/structured_analysis")
    assert (code, json.loads(body)["status"]) == (503, "unhealthy")
    assert pages.get("/health/elesh/another/structured_analysis")[0] == 404
    station.wait_for(lambda: [s for s in states(station) if s.child == "wedged"], "the register")
    child.resume()
    assert len(station.wait_decisions(1)) == 1
    station.wait_for(lambda: pages.ready()[0] == 200, "readiness again")
    page = json.loads(pages.get(f"/health/elesh/{worker.name}/structured_analysis")[1])
    assert page["metrics"]["structured_analysis_completion_rate"] == 1.0
    assert page["metrics"]["peak_memory_usage"] > 10 << 20
    assert page["metrics"]["analysis_duration_p95"] > 0


@pytest.mark.slow
def test_an_idle_child_that_dies_is_replaced_without_any_work(station: Station) -> None:
    worker = station.worker(**HEALTH)
    pages = Pages(worker)
    station.wait_for(lambda: pages.ready()[0] == 200, "readiness")
    first = worker.child
    first.kill()
    first.wait(60)

    def replaced() -> bool:
        found = psutil.Process(worker.process.pid).children()
        return bool(found) and found[0].pid != first.pid

    station.wait_for(replaced, "a fresh child")
    station.wait_for(lambda: pages.ready()[0] == 200, "readiness again")
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert decision.fallbacks == (), "no job was in the one that died"


@pytest.mark.slow
def test_every_metric_of_rules_and_dashboard_is_exposed(station: Station) -> None:
    worker = station.worker(**HEALTH)
    pages = Pages(worker)
    child = worker.child
    child.suspend()  # so that its death falls into the analysis
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    child.kill()
    (decision,) = station.wait_decisions(1)
    station.report(decision, "rolled_back", fallbacks=("layers_not_solved",), shortened_to=0.5)
    taken_back = {"level": "channel", "result": "rolled_back"}, 1.0
    station.wait_for(lambda: taken_back in pages.metrics()["elesh_outcomes_total"], "the outcome")
    found = pages.metrics()
    assert named_metrics() <= found.keys()
    labels, value = found["elesh_decisions_total"][0]
    assert (labels["verdict"], labels["reason"], value) == ("approved", "none", 1.0)
    assert found["elesh_fallbacks_total"] == [
        ({"fallback": "worker_crash", "rung": "worker_crash"}, 1.0)
    ]
    counted = {x["fallback"]: value for x, value in found["elesh_trainer_fallbacks_total"]}
    assert {name for name, value in counted.items() if value} == {"layers_not_solved", "shortened"}
    assert counted["held_back"] == counted["not_reconstructed"] == 0.0
    assert found["elesh_saved_parameters_total"] == [({}, 0.0)], "it was taken back"
    assert ({"level": "channel", "state": "open"}, 0.0) in found["elesh_breakers"]
    assert found["multi_level_accuracy"] == [({"level": "channel"}, 0.0)]
    for name in ("structured_analysis_completion_rate", "analysis_duration_p95"):
        assert found[name][0][1] > 0


@pytest.mark.slow
def test_a_worker_is_in_the_register_while_it_serves(station: Station) -> None:
    worker = station.worker(observe={"heartbeat_seconds": 0.5})
    (state,) = station.wait_for(lambda: [s for s in states(station) if s.ready], "the register")
    assert (state.worker_id, state.pid) == (worker.name, worker.process.pid)
    assert (state.doing, state.child, state.why) == ("idle", "idle", "")
    assert worker.end() == 0
    assert states(station) == []


@pytest.mark.slow
def test_a_port_that_is_taken_is_an_error_that_names_the_setting(station: Station) -> None:
    port = int(Pages(station.worker(**HEALTH)).url.rpartition(":")[2])
    path = station.settings_file(observe={"health_port": port})
    second = WorkerProcess(station.url, path, "w2", {})
    assert second.process.wait(60) == 1
    second._reader.join(60)
    assert f"observe.health_port: expected a free port of 127.0.0.1, found {port}" in "".join(
        second.log
    )


HOLD_LOCK = """
import sys
from pathlib import Path
from elesh.worker.compute.protocol import heartbeat_into
sys.setswitchinterval(1e6)  # the heartbeat thread never has its turn
heartbeat_into(Path(sys.argv[1]))
print("up", flush=True)
if sys.argv[2] == "compute":
    while True:
        pass
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ["wait", "compute"])
@pytest.mark.sampled
def test_a_child_that_holds_the_interpreter_lock_is_busy_and_not_wedged(
    doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elesh.worker.compute.protocol._SILENT_SECONDS", 1.0)
    heartbeat = HeartbeatReader(tmp_path / "heartbeat")
    child = psutil.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(heartbeat.path), doing],
        stdin=-1, stdout=-1,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == b"up\n"
        heartbeat.probe(child.pid, busy=True)
        begun = child.cpu_times().user
        while doing == "compute" and child.cpu_times().user < begun + 1.5:
            assert heartbeat.probe(child.pid, busy=True).child == "busy"
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 120
        while heartbeat.probe(child.pid, busy=True).child != "wedged":
            assert time.monotonic() < deadline
        assert "stopped" in heartbeat.probe(child.pid, busy=True).why
    finally:
        child.kill()
        child.wait()
    assert heartbeat.probe(None, busy=False).child == "dead"


@pytest.mark.slow
def test_metrics_leave_by_otlp_too(station: Station) -> None:
    with collecting() as collector:
        worker = station.worker({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
        station.publish(checkpoint())
        station.wait_decisions(1)
        assert worker.end() == 0
    assert {
        "structured_analysis_completion_rate", "analysis_duration_p95", "peak_memory_usage",
        "elesh.analyses", "elesh.analysis.duration", "elesh.decisions", "elesh.ready",
    } <= collector.metrics  # fmt: skip
