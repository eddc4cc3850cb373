"""The command line on its own: a saved checkpoint, breakers by hand."""

from __future__ import annotations

import json
from pathlib import Path

from station import checkpoint
from test_demo import elesh

from elesh import analyze


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
