"""The main job, as a user runs it: one demo run, looked at from its figures and its traces."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from collector import Collector, collecting

SCHEDULE = {
    "validation_epochs": 2,
    "conservative_epochs": 2,
    "moderate_epochs": 2,
    "aggressive_epochs": 2,
}


@dataclass(frozen=True)
class Run:
    """A finished demo: its figures, its traces, what it printed, how to look at its server."""

    figures: dict[str, Any]
    collector: Collector
    output: str
    environment: dict[str, str]
    settings: Path

    def elesh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return elesh(*arguments, environment=self.environment)


def elesh(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elesh.cli", *arguments],
        env=os.environ | environment | {"COLUMNS": "200"}, capture_output=True, text=True,
        timeout=800, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    settings = folder / "short.yaml"
    sections = {"safety_schedule": SCHEDULE}
    bus = {"partition": "demo"}
    settings.write_text(yaml.safe_dump({"elesh": {"structured_pruning": sections, "bus": bus}}))
    environment = {"ELESH_REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"}
    with collecting() as collector:
        done = elesh(
            "demo", "--epochs", "9", "--seed", "11", "--workers", "2",
            "--settings", str(settings), "--json", str(folder / "out.json"),
            environment=environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((folder / "out.json").read_text())
    return Run(figures, collector, done.stdout, environment, settings)


@pytest.mark.timeout(900)
def test_a_demo_run_approves_and_applies_decisions_and_shrinks_the_network(run: Run) -> None:
    figures = run.figures
    applied = [d for d in figures["decisions"] if d["outcome"] == "applied"]
    assert applied, run.output
    assert figures["parameters_after"] < figures["parameters_before"]
    assert figures["channels_after"] < figures["channels_before"]
    assert figures["accuracy_after"] > figures["accuracy_before"] - 0.02
    assert {"key", "level", "approved", "reason"} <= figures["decisions"][0].keys()


def test_every_cut_was_measured_by_a_worker_and_by_the_trainer(run: Run) -> None:
    approved = [d for d in run.figures["decisions"] if d["approved"]]
    assert len(run.figures["cuts"]) == len(approved) > 0
    applied = [cut for cut in run.figures["cuts"] if cut["trainer_accuracy_drop"] is not None]
    assert applied
    assert all(cut["low"] <= cut["worker_accuracy_drop"] <= cut["high"] for cut in applied)
    assert all(cut["predicted_loss_rise"] is not None for cut in applied)
    assert "Cuts: loss rise in thousandths and accuracy drop, predicted and measured" in run.output


def test_every_checkpoint_of_the_run_is_answered_once(run: Run) -> None:
    keys = [d["key"] for d in run.figures["decisions"]]
    assert len(keys) == len(set(keys)) == run.figures["epochs"]
    assert run.figures["missed"] == 0
    assert run.figures["unanswered"] == []


def test_no_phase_removes_more_than_its_limit(run: Run) -> None:
    removed = 1 - run.figures["channels_after"] / run.figures["channels_before"]
    assert removed <= 0.20
    preparation = [d for d in run.figures["decisions"] if d["epoch"] <= 2]
    assert all(not d["approved"] and "preparation" in d["reason"] for d in preparation)


def test_each_decision_is_one_connected_trace_from_checkpoint_to_outcome(run: Run) -> None:
    traces = run.collector.traces()
    for decision in run.figures["decisions"]:
        ours = [
            spans
            for spans in traces.values()
            if any(run.collector.attribute(s, "elesh.key") == decision["key"] for _, s in spans)
        ]
        assert len(ours) == 1, decision["key"]
        (spans,) = ours
        ids = {span.span_id for _, span in spans}
        roots = [span for _, span in spans if not span.parent_span_id]
        assert [root.name for root in roots] == ["checkpoint"]
        assert all(span.parent_span_id in ids for _, span in spans if span.parent_span_id)
        names = {span.name for _, span in spans}
        assert {
            "create checkpoints", "send checkpoints", "process checkpoints", "fetch blobs",
            "analyse channel", "analyse head", "analyse layer", "settle work", "apply decision",
            "create outcomes", "send outcomes", "process outcomes",
        } <= names  # fmt: skip
        assert {service for service, _ in spans} == {"elesh-trainer", "elesh-worker"}
        if decision["outcome"] == "applied":
            assert {"mask", "evaluate masked", "cut"} <= names


def test_the_trace_of_a_decision_is_printed_without_a_collector(run: Run) -> None:
    applied = next(d["key"] for d in run.figures["decisions"] if d["outcome"] == "applied")
    done = run.elesh("trace", applied)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("create checkpoints", "analyse channel", "cut", "process outcomes"):
        took = re.compile(rf"{name}.*\d m?s")
        assert any(took.search(line) for line in lines), done.stdout
    assert run.elesh("trace", "9:no:such:key").returncode == 1


def test_a_replay_of_the_whole_run_is_bit_identical(run: Run) -> None:
    done = run.elesh(
        "replay", "--run", run.figures["run_id"], "--diff", "--settings", str(run.settings)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(run.figures["decisions"])
    assert f"{count} of {count} bit-identical" in done.stdout


def test_a_replay_under_other_settings_says_that_they_differ_and_where(
    run: Run, tmp_path: Path
) -> None:
    changed = yaml.safe_load(run.settings.read_text())
    changed["elesh"]["structured_pruning"]["channel_analysis"] = {"min_channels_per_layer": 30}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(changed))
    applied = next(d["key"] for d in run.figures["decisions"] if d["outcome"] == "applied")
    done = run.elesh("replay", applied, "--diff", "--settings", str(other))
    assert done.returncode == 1
    where = "structured_pruning.channel_analysis.min_channels_per_layer"
    assert f"setting {where}: 16 -> 30" in done.stdout
    assert "differs in" in done.stdout


def test_explain_tells_why_each_channel_went(run: Run) -> None:
    applied = next(d["key"] for d in run.figures["decisions"] if d["outcome"] == "applied")
    done = run.elesh("explain", applied, "--all", "--settings", str(run.settings))
    assert done.returncode == 0, done.stderr
    for word in ("approved", "removed", "minimum_channels", "predicted shift"):
        assert word in done.stdout
    brief = run.elesh("explain", applied, "--settings", str(run.settings))
    assert "gates passed" in brief.stdout
    assert brief.stdout.count("\n") < done.stdout.count("\n")


def test_errors_are_one_line_that_names_what_is_wrong(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("elesh:\n  sketch_widht: 3\n")
    done = run.elesh("breaker", "show", "--settings", str(wrong))
    assert done.returncode == 1
    assert "wrong.yaml:2: sketch_widht: unknown key (did you mean sketch_width?)" in done.stderr
    done = run.elesh("explain", "not-a-key")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = elesh("breaker", "show", environment={"ELESH_REDIS_URL": "redis://127.0.0.1:1/0"})
    assert done.returncode == 1
    assert "redis://127.0.0.1:1/0" in done.stderr
