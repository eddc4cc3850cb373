"""What the demo shows fits a terminal of 80 columns, and its budget is given in plain words."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from elesh.cli import app
from elesh.demo.network import DigitsNet
from elesh.demo.screen import Screen, report_tables
from elesh.demo.training import EpochFigures, Report
from elesh.trainer import Evaluation, Recorder


def test_the_line_of_progress_shows_epoch_and_channels_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Screen(console, 124) as screen:
        screen.on_epoch(EpochFigures(104, "conservative", 0.01, 0.99, 9, 9, 1264, True))
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    line = shown.replace("\r", "\n").strip().splitlines()[-1]
    assert "104/124" in line
    assert "conservative" in line
    assert "channels 1264" in line
    assert len(line.rstrip()) <= 80
    assert "…" not in line


def test_training_that_stands_still_for_an_answer_says_so() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Screen(console, 124) as screen:
        screen.on_epoch(EpochFigures(36, "conservative", 0.01, 0.99, 9, 9, 336, True))
        screen.on_wait()
    assert isinstance(console.file, io.StringIO)
    assert "waiting" in console.file.getvalue()


@pytest.mark.parametrize(("given", "told"), [("macs", "macs=0.3"), ("macs=half", "macs=0.3")])
def test_a_budget_that_is_no_share_is_a_wrong_call(given: str, told: str) -> None:
    result = CliRunner().invoke(app, ["demo", "--budget", given])
    assert result.exit_code == 2
    assert told in result.output


def test_a_group_that_went_with_its_layer_has_a_row_that_says_so() -> None:
    model = DigitsNet(blocks=(2, 1), identity=True)
    original = Recorder(model, torch.zeros(2, 1, 8, 8)).architecture
    now = original.without_layers(["stage1.0"])
    gone = [g.name for g in original.groups if g.name not in now.group]
    assert gone
    console = Console(file=io.StringIO(), width=80)
    for shown in report_tables(Report(Evaluation(0.9, 0.1), Evaluation(0.9, 0.1)), original, now):
        console.print(shown)
    assert isinstance(console.file, io.StringIO)
    row = next(x for x in console.file.getvalue().splitlines() if gone[0] in x)
    assert "went with its layer" in row


def test_what_became_of_a_decision_stays_in_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80)
    goes = "21 channels of 3 groups, 1 head of transformer.1.attention, layer stage1.3"
    monkeypatch.setattr("elesh.demo.screen._what_goes", lambda decision: goes)
    outcome = SimpleNamespace(
        result="applied", detail="", accuracy_before=0.9956, accuracy_masked=0.99,
        rolled_back_epoch=None, accuracy_after=None,
    )  # fmt: skip
    Screen(console, 9).on_decision(SimpleNamespace(epoch=100), outcome)  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    first, *others = console.file.getvalue().splitlines()
    assert first.startswith("  applied     epoch 100: 21 channels")
    assert others
    assert all(line.startswith(" " * 14) and line[14] != " " for line in others)
    assert all(len(line) <= 80 for line in (first, *others))
