"""A slice of the chaos driver, and proof that its audit can fail; longer runs are by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from leyline import TelemetryEvent
from tests.chaos.audit import Facts, audit
from tests.chaos.faults import Fault, Kind
from tests.chaos.idle import Life

ROOT = Path(__file__).parents[3]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def chaos(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.chaos", "--minutes", "0.15", "--lease", "2", "--workers",
            "2", "--pause", "0.8", "--every", "0.4", "--folder", str(folder), *arguments,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    report = folder / "report.json"
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text())


@pytest.mark.slow
def test_no_key_is_lost_or_decided_twice_and_no_live_lease_stolen(tmp_path: Path) -> None:
    code, figures = chaos(tmp_path, "--seed", "3")
    assert not any(figures["violations"].values()), figures
    assert code == 0
    assert figures["decisions"] > 5
    assert {"kill worker", "restart server"} <= figures["faults"].keys()


@pytest.mark.soak
def test_acknowledging_before_storing_is_found_by_the_audit(tmp_path: Path) -> None:
    code, figures = chaos(tmp_path, "--seed", "3", "--mutate", "acknowledge-first")
    assert code == 1
    assert figures["violations"]["lost keys"], figures


@pytest.mark.soak
def test_forgetting_what_was_decided_is_found_by_the_audit(tmp_path: Path) -> None:
    code, figures = chaos(tmp_path, "--seed", "3", "--mutate", "forget-records")
    assert code == 1
    assert figures["violations"]["duplicate decisions"], figures


def told(step: str, worker: str, key: str, second: float, detail: str = "") -> TelemetryEvent:
    at = NOW + timedelta(seconds=second)
    values = {"step": step, "worker_id": worker, "idempotency_key": key, "at": at}
    return TelemetryEvent.model_validate(values | {"detail": detail})


CLEAN = Facts(
    acknowledged=frozenset({"e1"}),
    checkpoints={"e1": "k1", "e2": "k2"},
    decisions=["k1", "k2"],
    records=frozenset({"k1", "k2"}),
    dead_letters=[],
    telemetry=[
        told("received", "w1", "1:h:k1:channel", 0),
        told("reclaimed", "w2", "", 16, "checkpoints/1-1: crash: of w1"),
        told("received", "w2", "1:h:k1:channel", 17.5),
        told("settled", "w2", "1:h:k1:channel", 18),
    ],
    poison=frozenset(),
    pending=0,
    faults=[Fault(Kind.KILL_WORKER, "w1", NOW.timestamp() + 2, NOW.timestamp() + 2)],
    lease=15.0,
)


def test_what_a_killed_worker_held_is_timed_until_it_runs_elsewhere() -> None:
    report = audit(CLEAN)
    assert report.clean
    assert (report.recoveries, report.offers) == ([15.5], [14.0])


WAITED = [
    told("received", "w1", "1:h:k1:channel", 0),
    told("received", "w2", "1:h:k9:channel", 1),
    told("settled", "w2", "1:h:k9:channel", 30),
    told("received", "w2", "1:h:k1:channel", 32),
]


def test_while_every_worker_is_at_work_nobody_is_late() -> None:
    start, kill = NOW.timestamp(), CLEAN.faults[0]
    lives = [Life("w1", start - 9, start + 2), Life("w2", start - 9, start + 99)]
    report = audit(replace(CLEAN, lives=lives, telemetry=WAITED))
    assert report.recoveries == [32 - 2]
    assert report.unattended == [pytest.approx(15 + 1.9)], "a moment belongs to the entry before"
    frozen = Fault(Kind.FREEZE_WORKER, "w2", start + 30, start + 32)
    report = audit(replace(CLEAN, lives=lives, telemetry=WAITED, faults=[kill, frozen]))
    assert report.unattended == [pytest.approx(15)]


def test_a_worker_with_free_hands_makes_the_others_delay_count() -> None:
    start = NOW.timestamp()
    lives = [Life("w2", start - 9, start + 99), Life("w3", start + 20, start + 99)]
    report = audit(replace(CLEAN, lives=lives, telemetry=WAITED))
    assert report.unattended == [pytest.approx(15 + 12)], "w3 could have taken it from second 20"


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"acknowledged": frozenset({"e3"})}, "lost events"),
        ({"decisions": ["k1"]}, "lost keys"),
        ({"decisions": ["k1", "k2", "k2"]}, "duplicate decisions"),
        ({"records": frozenset({"k1"})}, "decisions without record"),
        ({"poison": frozenset({"1-1"})}, "lost poison"),
        ({"pending": 1}, "left pending"),
        ({"asked": frozenset({"k1"})}, "deaf"),
        ({"faults": []}, "live leases stolen"),
        ({"telemetry": [told("conflict", "w1", "k1", 0)]}, "conflicts"),
        ({"checkpoints": {"e1": "k1"}}, "decided unasked"),
    ],
)
def test_every_broken_promise_is_named(change: dict[str, Any], broken: str) -> None:
    violations = audit(replace(CLEAN, **change)).violations
    assert [name for name, found in violations.items() if found] == [broken]
