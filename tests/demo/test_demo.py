"""The main job, as a user runs it: one demo run, looked at from its figures and its traces.

Its first checkpoint is spoiled and one of its workers is killed: see ``recorded.py``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from command import elesh
from recorded import Recorded


def test_a_demo_run_approves_and_applies_decisions_and_shrinks_the_network(
    recorded: Recorded,
) -> None:
    figures = recorded.figures
    applied = [d for d in figures["decisions"] if d["outcome"] == "applied"]
    assert applied, recorded.output
    assert figures["parameters_after"] < figures["parameters_before"]
    assert figures["channels_after"] < figures["channels_before"]
    assert figures["accuracy_after"] > figures["accuracy_before"] - 0.02
    assert {"key", "level", "approved", "reason"} <= figures["decisions"][0].keys()


def test_every_cut_was_measured_by_a_worker_and_by_the_trainer(recorded: Recorded) -> None:
    approved = [d for d in recorded.figures["decisions"] if d["approved"]]
    assert len(recorded.figures["cuts"]) == len(approved) > 0
    applied = [cut for cut in recorded.figures["cuts"] if cut["trainer_accuracy_drop"] is not None]
    assert applied
    assert all(cut["low"] <= cut["worker_accuracy_drop"] <= cut["high"] for cut in applied)
    predicted = [cut["predicted_loss_rise"] for cut in applied]
    assert None not in predicted
    assert any(abs(rise) > 1e-5 for rise in predicted), "nothing to be seen"
    title = "Cuts: loss increase (thousandths), accuracy drop; samples not trained on"
    assert title in recorded.output


def test_every_checkpoint_of_the_run_is_answered_once(recorded: Recorded) -> None:
    """Also those that a killed worker held; but the spoiled one, which is said to have failed."""
    keys = [d["key"] for d in recorded.figures["decisions"]]
    assert len(keys) == len(set(keys)) == recorded.figures["epochs"] - 1
    assert [key.split(":")[0] for key in recorded.figures["failed"]] == ["1"]
    assert recorded.figures["missed"] == 0
    assert recorded.figures["unanswered"] == []


def test_no_phase_removes_more_than_its_limit(recorded: Recorded) -> None:
    removed = 1 - recorded.figures["channels_after"] / recorded.figures["channels_before"]
    assert removed <= 0.20
    preparation = [d for d in recorded.figures["decisions"] if d["epoch"] <= 2]
    assert all(not d["approved"] and "preparation" in d["reason"] for d in preparation)


def test_each_decision_is_one_connected_trace_from_checkpoint_to_outcome(
    recorded: Recorded,
) -> None:
    collector = recorded.collector
    traces = collector.traces()
    for decision in recorded.figures["decisions"]:
        ours = [
            spans
            for spans in traces.values()
            if any(collector.attribute(s, "elesh.key") == decision["key"] for _, s in spans)
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
            "analyse channel", "apply decision",
            "create outcomes", "send outcomes", "process outcomes",
        } <= names  # fmt: skip
        # One whose first worker was killed goes in parts.
        assert {"decide", "settle checkpoints"} <= names or {"process work", "settle work"} <= names
        assert {service for service, _ in spans} == {"elesh-trainer", "elesh-worker"}
        if decision["outcome"] == "applied":
            assert {"mask", "evaluate masked", "cut"} <= names


def test_the_trace_of_a_decision_is_printed_without_a_collector(recorded: Recorded) -> None:
    applied = next(d["key"] for d in recorded.figures["decisions"] if d["outcome"] == "applied")
    done = recorded.elesh("trace", applied)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("create checkpoints", "decide", "analyse layer", "cut", "process outcomes"):
        took = re.compile(rf"{name}.*\d m?s")
        assert any(took.search(line) for line in lines), done.stdout
    assert recorded.elesh("trace", "9:no:such:key").returncode == 1


@pytest.mark.slow
def test_a_replay_of_the_whole_run_is_bit_identical(recorded: Recorded) -> None:
    """But the spoiled checkpoint, which has no decision now, as it had none then."""
    done = recorded.elesh(
        "replay", "--run", recorded.run_id, "--diff", "--settings", str(recorded.settings)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    count = len(recorded.figures["decisions"])
    assert f"{count} of {count + 1} bit-identical" in done.stdout
    assert done.stdout.startswith("1:")
    assert "no decision now" in done.stdout.splitlines()[0]


@pytest.mark.slow
def test_a_replay_under_other_settings_says_that_they_differ_and_where(
    recorded: Recorded, tmp_path: Path
) -> None:
    changed = yaml.safe_load(recorded.settings.read_text())
    changed["elesh"]["structured_pruning"]["channel_analysis"] = {"min_channels_per_layer": 30}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(changed))
    applied = next(d["key"] for d in recorded.figures["decisions"] if d["outcome"] == "applied")
    done = recorded.elesh("replay", applied, "--diff", "--settings", str(other))
    assert done.returncode == 1
    where = "structured_pruning.channel_analysis.min_channels_per_layer"
    assert f"setting {where}: 16 -> 30" in done.stdout
    assert "differs in" in done.stdout


def test_explain_tells_why_each_channel_went(recorded: Recorded) -> None:
    applied = next(d["key"] for d in recorded.figures["decisions"] if d["outcome"] == "applied")
    done = recorded.elesh("explain", applied, "--all", "--settings", str(recorded.settings))
    assert done.returncode == 0, done.stderr
    for word in ("approved", "removed", "minimum_channels", "predicted shift"):
        assert word in done.stdout
    brief = recorded.elesh("explain", applied, "--settings", str(recorded.settings))
    assert "gates passed" in brief.stdout
    assert brief.stdout.count("\n") < done.stdout.count("\n")


def test_errors_are_one_line_that_names_what_is_wrong(recorded: Recorded, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("elesh:\n  sketch_widht: 3\n")
    done = recorded.elesh("breaker", "show", "--settings", str(wrong))
    assert done.returncode == 1
    assert "wrong.yaml:2: sketch_widht: unknown key (did you mean sketch_width?)" in done.stderr
    done = recorded.elesh("explain", "not-a-key")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = elesh("breaker", "show", environment={"ELESH_REDIS_URL": "redis://127.0.0.1:1/0"})
    assert done.returncode == 1
    assert "redis://127.0.0.1:1/0" in done.stderr
