"""What the demo prints: progress on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Self

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from leyline import (
    Level,
    PrunedArchitecture,
    PruningGroup,
    PruningOutcome,
    StructuralPruningDecision,
)

from .training import EpochFigures, Report, total_channels

_INDENT = 14
"""Columns that an outcome takes before its text."""
_COLOURS = {"applied": "green", "rolled_back": "red", "refused": "yellow", "rejected": "dim"}


class Screen:
    """Live progress of a run on ``console``; also its observer."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._progress = Progress(
            # 80 columns in all.
            TextColumn("[bold]epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn(
                "{task.fields[phase]:12} accuracy {task.fields[accuracy]:6.1%} "
                "channels {task.fields[channels]:3d}"
            ),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "epochs",
            total=epochs,
            phase="starting",
            accuracy=0.0,
            channels=0,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_epoch(self, figures: EpochFigures) -> None:
        """Move the bar; where there is no terminal, one line for each checkpoint."""
        self._progress.update(
            self._task,
            completed=figures.epoch,
            phase=figures.phase,
            accuracy=figures.accuracy,
            channels=figures.channels,
        )
        if not self._console.is_terminal and figures.checkpoint:
            self._console.print(
                f"epoch {figures.epoch:3d}  {figures.phase:12}  accuracy {figures.accuracy:.2%}  "
                f"loss {figures.loss:.3f}  channels {figures.channels}",
                highlight=False,
            )

    def on_wait(self) -> None:
        """Say in the line of progress that training stands still for an answer."""
        self._progress.update(self._task, phase="waiting")

    def on_provoked(self, epoch: int) -> None:
        """Say what is done on purpose."""
        line = f"  epoch {epoch} is trained on wrong labels, to show how a cut is taken back"
        self._console.print(line, highlight=False)

    def on_decision(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """One line for what was applied, rolled back or refused; rejected ones are counted."""
        if outcome.result == "rejected":
            return
        drop = ""
        if outcome.accuracy_before is not None and outcome.accuracy_masked is not None:
            before, masked = outcome.accuracy_before, outcome.accuracy_masked
            drop = f", validation accuracy {before:.2%} to {masked:.2%}"
        if outcome.rolled_back_epoch is not None:
            drop += f", after the cut {outcome.accuracy_after or 0:.2%}"
        if why := _in_short(outcome.detail):
            drop += f" ({why})"
        colour = _COLOURS[outcome.result]
        lines = [*self._wrapped(f"epoch {decision.epoch}: {_what_goes(decision)}")]
        lines += self._wrapped(drop.removeprefix(", "))
        for number, line in enumerate(lines):
            start = " " * _INDENT if number else f"  [{colour}]{outcome.result:11}[/] "
            self._console.print(start + escape(line), highlight=False)

    def _wrapped(self, text: str) -> list[str]:
        """As lines beside the column of outcomes."""
        return textwrap.wrap(text, max(20, self._console.width - _INDENT))


def _what_goes(decision: StructuralPruningDecision) -> str:
    """For example: 7 channels of 3 groups, 1 head of attention, layer stage1.1."""
    parts = []
    for name, targets in (("channel", decision.channels), ("head", decision.attention_heads)):
        count = sum(len(target.indices) for target in targets)
        if count:
            one = targets[0].layer_name
            where = one if len(targets) == 1 else f"{len(targets)} groups"
            parts.append(f"{count} {name}{'s' * (count > 1)} of {where}")
    parts += [f"layer {target.layer_name}" for target in decision.layers]
    return ", ".join(parts)


def report_tables(
    report: Report, original: PrunedArchitecture, now: PrunedArchitecture
) -> list[Table]:
    """The tables that a run ends with."""
    return [
        _summary(report, original, now),
        _by_layer(original, now),
        _by_decision(report),
        _by_outcome(report),
    ]


def _summary(report: Report, original: PrunedArchitecture, now: PrunedArchitecture) -> Table:
    table = Table(title="Held-out data and size", title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    before, after = report.before, report.after
    table.add_row(
        "accuracy",
        f"{before.accuracy:.2%}",
        f"{after.accuracy:.2%}",
        f"{100 * (after.accuracy - before.accuracy):+.2f} points",
    )
    table.add_row(
        "loss", f"{before.loss:.4f}", f"{after.loss:.4f}", f"{after.loss - before.loss:+.4f}"
    )
    rows = (
        ("parameters", original.parameters, now.parameters),
        ("MACs a sample", original.macs, now.macs),
        ("channels", total_channels(original), total_channels(now)),
    )
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{100 * (new - old) / max(old, 1):+.1f}%")
    for size, (was, took) in sorted(report.latency.items()):
        name = f"latency, batch of {size}"
        table.add_row(name, f"{1e3 * was:.2f} ms", f"{1e3 * took:.2f} ms", f"{was / took:.2f}x")
    return table


def _by_layer(original: PrunedArchitecture, now: PrunedArchitecture) -> Table:
    table = Table(title="Channels by group of coupled layers", title_justify="left")
    table.add_column("group")
    for name in ("before", "after", "removed"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for group in original.groups:
        if group.level is not Level.CHANNEL:
            continue
        size = size_of(now, group.name)
        table.add_row(
            group.name,
            str(group.size),
            str(size),
            str(group.size - size) if size != group.size else "",
            _note(group, now),
        )
    return table


def _note(group: PruningGroup, now: PrunedArchitecture) -> str:
    if group.name not in now.group:
        return "went with its layer"
    return "" if group.prunable else f"left alone: {group.reason}"


def size_of(now: PrunedArchitecture, group: str) -> int:
    """How many units are left of a group; none of one that went with a whole layer."""
    return now.group[group].size if group in now.group else 0


def _by_decision(report: Report) -> Table:
    """What every cut was predicted to cost, and what worker and trainer measured."""
    title = "Cuts: loss increase (thousandths), accuracy drop; samples not trained on"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.padding, table.show_edge = 0, False  # so that 80 columns are enough
    table.add_column("epoch", justify="right")
    table.add_column("level", max_width=8)  # one a line
    table.add_column("cut of\nproposed", justify="right")
    for name in ("loss:\npredicted", "\nworker", "\ntrainer"):
        table.add_column(name, justify="right")
    for name in ("drop:\nworker", "on other\nsamples", "\ntrainer"):
        table.add_column(name, justify="right")
    for cut in report.cuts:
        drop = _figure(cut.trainer_accuracy_drop, ".2%")
        table.add_row(
            str(cut.epoch),
            ", ".join(cut.levels),
            f"{cut.kept}/{cut.proposed}",
            _thousandths(cut.predicted_loss_rise),
            _thousandths(cut.worker_loss_increase),
            _thousandths(cut.trainer_loss_increase),
            f"{cut.worker_accuracy_drop:.2%}",
            f"{100 * cut.low:.1f}..{cut.high:.1%}",
            drop if cut.inside else f"[yellow]{drop}![/]",
        )
    if not all(cut.inside for cut in report.cuts):
        table.caption = "!: outside the interval that the worker stated for other samples"
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _thousandths(value: float | None) -> str:
    return "" if value is None else format(1000 * value, "+.2f")


def _by_outcome(report: Report) -> Table:
    table = Table(title="Decisions by outcome", title_justify="left")
    table.add_column("outcome")
    table.add_column("count", justify="right")
    table.add_column("reason", overflow="fold")
    counts: Counter[tuple[str, str]] = Counter()
    for decision in report.decisions:
        result = report.outcomes[decision.idempotency_key]
        counts[(result.result, _in_short(result.detail))] += 1
    for (outcome, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(f"[{_COLOURS[outcome]}]{outcome}[/]", str(count), reason)
    if report.failed:
        table.add_row("[red]analysis failed[/]", str(len(report.failed)), "see elesh dead list")
    if report.unanswered:
        table.add_row(
            "[yellow]no answer[/]", str(len(report.unanswered)), "no worker answered in time"
        )
    if report.missed:
        table.add_row("[yellow]not published[/]", str(report.missed), "the bus was away")
    return table


def _in_short(detail: str) -> str:
    """A reason without what is another one at every decision: figures and hashes."""
    if detail.startswith("carried over"):
        return f"{detail.partition(': ')[2]}, another cut came first"
    if detail.startswith("taken back with"):
        return "taken back with the cut before it"
    if detail.startswith("stale:"):
        return "stale: another cut came first"
    return detail.partition(" (")[0]
