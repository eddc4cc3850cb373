"""The command line on its own: a saved checkpoint, breakers by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import elesh
from pydantic import ValidationError
from station import Station, checkpoint

from elesh import analyze
from leyline import Level


def test_analyze_of_a_saved_checkpoint_prints_the_library_s_decision(tmp_path: Path) -> None:
    bundle = checkpoint()
    folder = bundle.save(tmp_path / "bundle")
    done = elesh("analyze", str(folder), "--json", environment={})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == analyze(bundle).model_dump(mode="json")


def test_analyze_for_people_shows_verdict_gates_and_every_removed_channel(tmp_path: Path) -> None:
    bundle = checkpoint()
    done = elesh("analyze", str(bundle.save(tmp_path)), environment={})
    decision = analyze(bundle)
    assert done.stdout.count("removed ") >= sum(map(len, decision.units.values()))
    for gate in decision.safety.gates:
        assert gate.name in done.stdout


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    done = elesh("analyze", str(tmp_path / "nothing"), environment={})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "nothing") in done.stderr


def test_breakers_are_tripped_shown_and_reset_by_hand(redis_url: str, partition: str) -> None:
    environment = {"ELESH_REDIS_URL": redis_url, "ELESH_BUS__PARTITION": partition}

    def run(*arguments: str) -> str:
        done = elesh("breaker", *arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("trip", "run-a", "--reason", "a strange evening")
    run("trip", "run-b")
    shown = run("show")
    assert "run-a" in shown
    assert "a strange evening" in shown
    run("reset", "run-a")
    assert "run-a" not in run("show")
    assert "run-b" in run("show")
    run("reset")
    assert "run-b" not in run("show")


def test_a_breaker_that_cannot_be_reset_keeps_no_other_open(station: Station) -> None:
    with pytest.raises(ValidationError):  # raised once it is written, as other clients may do
        station.on_bus(lambda bus: bus.breakers.trip("a run", Level.CHANNEL, "x"))
    station.on_bus(lambda bus: bus.breakers.trip("run-b", Level.CHANNEL, "x"))
    environment = {"ELESH_REDIS_URL": station.url, "ELESH_BUS__PARTITION": station.partition}
    done = elesh("breaker", "reset", environment=environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "breaker of a run at level channel: run: " in done.stderr
    assert "run-b at level channel: closed" in done.stdout
    assert [view.run_id for view in station.on_bus(lambda bus: bus.breakers.show())] == ["a run"]


def test_the_design_document_s_settings_pass_the_check_and_wrong_ones_name_line_and_key(
    tmp_path: Path,
) -> None:
    design = Path(__file__).parents[1] / "data" / "design.yaml"
    assert elesh("config", "check", str(design), environment={}).returncode == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("elesh:\n  structured_pruning:\n    safety_schedule:\n      epochs: 3\n")
    done = elesh("config", "check", str(wrong), environment={})
    assert done.returncode == 1
    assert f"{wrong}:4: structured_pruning.safety_schedule.epochs: unknown key" in done.stderr


def test_the_plan_is_the_document_s_formula() -> None:
    assert elesh("plan", "1000000000", environment={}).stdout == "3 workers\n"
    done = elesh("plan", "1000000000", "--levels", "1", "--seconds", "120", environment={})
    assert done.stdout == "17 workers\n"


def test_the_help_has_every_command_under_a_heading() -> None:
    done = elesh("--help", environment={"COLUMNS": "200"})
    for heading in ("Run", "Decide and explain", "Watch", "Operate"):
        assert f"─ {heading} ─" in done.stdout
    assert "─ Commands ─" not in done.stdout


@pytest.mark.slow
def test_the_shell_completes_commands() -> None:
    program = str(Path(sys.executable).with_name("elesh"))
    asked = {"_ELESH_COMPLETE": "complete_bash", "COMP_WORDS": "elesh st", "COMP_CWORD": "1"}
    done = subprocess.run(
        [program], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["status"]
    # Typer asks which shell it runs in; here it is told, since there may be none above a test.
    told = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(
        [program, "--show-completion", "bash"],
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "complete" in shown.stdout


@pytest.mark.slow
def test_status_shows_workers_backlog_and_the_last_decisions(station: Station) -> None:
    environment = {"ELESH_REDIS_URL": station.url, "ELESH_BUS__PARTITION": station.partition}
    nobody = elesh("status", environment=environment)
    assert "no worker is alive" in nobody.stdout
    worker = station.worker(observe={"heartbeat_seconds": 0.5})
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    station.wait_for(
        lambda: [
            w for w in station.on_bus(lambda bus: bus.registry.workers()) if w.ready and w.completed
        ],
        "the register",
    )
    shown = elesh("status", environment=environment | {"COLUMNS": "200"}).stdout
    assert "Workers: 1 of 1 ready" in shown
    for text in (worker.name, "checkpoints", decision.idempotency_key, "approved"):
        assert text in shown


def test_plan_counts_workers_by_gpu_where_that_is_more() -> None:
    done = elesh("plan", "1000", "--gpus", "2", environment={"ELESH_ANALYSIS_WORKERS_PER_GPU": "3"})
    assert done.stdout.splitlines()[0] == "6 workers"
    assert elesh("plan", "1000", environment={}).stdout == "1 worker\n"
