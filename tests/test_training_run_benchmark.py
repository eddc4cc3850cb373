"""benchmarks.training_run: runs are finished once, and a method that fails is a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.pruning import decision, passes
from benchmarks.training_run import __main__ as command
from benchmarks.training_run import overhead
from benchmarks.training_run.methods import METHODS, lines_of
from benchmarks.training_run.picture import tables
from benchmarks.training_run.run import Run


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in out.read_text().splitlines()]


def test_a_run_that_is_finished_is_not_repeated_and_a_failure_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run) -> None:
        raise RuntimeError("no such layer")

    out = tmp_path / "results.jsonl"
    monkeypatch.setitem(METHODS, "network slimming", broken)
    monkeypatch.setattr(command, "speed_up", lambda *_: {"1": 1.0, "64": 1.0})
    words = "--tasks tabular --shares 50 --seeds 0 --epochs 1 --samples 128 --width 16"
    chosen = ["--methods", "unpruned;network slimming;small from the start", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["training_run", *words.split(), *chosen])
    command.main()
    first = lines(out)
    assert [line["method"] for line in first] == [
        "unpruned",
        "network slimming",
        "small from the start",
    ]
    assert first[1]["error"] == "RuntimeError: no such layer"
    assert float(str(first[2]["macs"])) <= 0.5
    command.main()
    assert lines(out) == first
    assert "- network slimming: RuntimeError: no such layer" in tables(first)


def test_lines_of_a_method_are_those_that_an_engineer_writes() -> None:
    assert lines_of("unpruned") == 0
    assert lines_of("ours") == 9


def test_a_part_of_the_overhead_counts_what_it_calls_itself_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Work:
        def outer(self) -> str:
            ticks.append(2.0)
            self.inner()
            ticks.append(1.0)
            return "done"

        def inner(self) -> None:
            ticks.append(5.0)

    ticks: list[float] = []
    monkeypatch.setattr(overhead, "PARTS", {"a": ((Work, "outer"),), "b": ((Work, "inner"),)})
    parts = overhead.Parts(lambda: sum(ticks))
    with parts.timed():
        assert Work().outer() == "done"
    Work().outer()
    assert parts.seconds == {"a": 3.0, "b": 5.0}


@pytest.mark.slow
def test_every_part_that_is_timed_by_itself_is_there() -> None:
    timed = [*decision.PARTS.values(), *passes.PARTS.values()]
    for owner, name in [*timed, *(pair for pairs in overhead.PARTS.values() for pair in pairs)]:
        assert callable(getattr(owner, name)), name
