"""The result of pruning, as figures and as a table of 80 columns."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from elesh.trainer.goals import ResourceUse
from elesh.trainer.surgery.reconstruction.output_matching import Matched
from leyline import Level, PrunedArchitecture

__all__ = ["Figures", "PruningReport", "ResourceUse", "Round", "Spared"]

_WIDTH = 80


@dataclass(frozen=True)
class Figures:
    """A network's own."""

    accuracy: float
    """Share of right answers, 0 to 1; NaN where nothing says what is right."""
    loss: float
    """Mean, a sample."""
    parameters: int
    macs: int
    """Multiply-accumulates of one sample."""
    latency: dict[int, float] = field(default_factory=dict)
    """Seconds of one call by the samples in it, measured on the network's device."""


@dataclass(frozen=True)
class Round:
    """One cut that was tried."""

    number: int
    units: int
    layers: int
    macs: float
    """Share of the original multiply-accumulates after it."""
    accuracy: float
    loss: float
    refused: str = ""
    """Why it was taken back; empty if it stayed."""


@dataclass(frozen=True)
class Spared:
    """A group that keeps units, or all of them, for a reason of its own."""

    group: str
    reason: str


@dataclass(frozen=True)
class PruningReport:
    """Before and after, by group, and what was spared. ``print`` shows it as tables."""

    before: Figures
    after: Figures
    original: PrunedArchitecture
    architecture: PrunedArchitecture
    """After all cuts; its history holds them in original numbering."""
    budget: tuple[ResourceUse, ...]
    rounds: tuple[Round, ...]
    spared: tuple[Spared, ...]
    data: str
    """What accuracy and loss were measured on."""
    held_back: str = ""
    """Why a budget was not reached, and what would help; empty where all were."""
    seconds: float = 0.0
    turned: tuple[str, ...] = ()
    """Groups whose channels are principal components of what they were: no channel of theirs is one
    of the original network's."""
    matched: Matched | None = None
    """How much of the outputs' variance was missing before and after all layers were brought nearer
    to the outputs before, without labels; None where they were not."""
    fallbacks: tuple[str, ...] = ()
    """What was done otherwise than asked for, and why."""

    @property
    def reached(self) -> bool:
        """Whether every budget was."""
        return all(use.met for use in self.budget)

    @property
    def removed(self) -> dict[str, int]:
        """Units removed by group, and 1 by removed layer."""
        now = self.architecture.group
        lost = {
            group.name: group.size - (now[group.name].size if group.name in now else 0)
            for group in self.original.groups
        }
        gone = {block.name: 1 for block in self.architecture.blocks if block.removed}
        return {name: count for name, count in (lost | gone).items() if count}

    def tables(self) -> list[Table]:
        """For a rich console."""
        tables = [self._summary(), self._groups()]
        return [*tables, self._spared()] if self.spared else tables

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        for table in self.tables():
            console.print(table)
        console.print(self._verdict(), highlight=False)
        assert isinstance(console.file, io.StringIO)
        return _printable(console.file.getvalue().rstrip())

    def _verdict(self) -> str:
        lines = [
            f"{use.resource}: {use.reached:.1%} left, asked for {use.asked:.1%}: "
            + ("reached" if use.met else "not reached")
            for use in self.budget
        ]
        if self.seconds:
            rounds = f"{len(self.rounds)} round" + "s" * (len(self.rounds) != 1)
            lines.append(f"{rounds} in {_time(self.seconds)}")
        if self.matched is not None:
            missing = f"{self.matched.before:.1%} to {self.matched.after:.1%} apart"
            lines.append(f"outputs matched to those before the cut, without labels: {missing}")
        return "\n".join([*lines, *self.fallbacks, *([self.held_back] if self.held_back else [])])

    def _summary(self) -> Table:
        table = _table(f"Before and after (accuracy and loss: {self.data})")
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="right" if name else "left")
        old, new = self.before, self.after
        if not math.isnan(old.accuracy):
            points = 100 * (new.accuracy - old.accuracy)
            row = (f"{old.accuracy:.2%}", f"{new.accuracy:.2%}", f"{points:+.2f} points")
            table.add_row("accuracy", *row)
        table.add_row("loss", f"{old.loss:.4f}", f"{new.loss:.4f}", f"{new.loss - old.loss:+.4f}")
        for name, a, b in (
            ("parameters", old.parameters, new.parameters),
            ("MACs a sample", old.macs, new.macs),
        ):
            table.add_row(name, f"{a:,}", f"{b:,}", f"{100 * (b - a) / max(a, 1):+.1f}%")
        for size in sorted(old.latency.keys() & new.latency.keys()):
            was, now = old.latency[size], new.latency[size]
            name = f"latency, batch of {size}"
            table.add_row(name, _time(was), _time(now), f"{was / now:.2f}x as fast")
        return table

    def _groups(self) -> Table:
        table = _table("By group of coupled layers")
        table.add_column("group", overflow="fold")
        table.add_column("units")
        for name in ("before", "after", "removed"):
            table.add_column(name, justify="right")
        removed = self.removed
        for group in self.original.groups:
            lost = removed.get(group.name, 0)
            if lost:
                kind = "heads" if group.level is Level.HEAD else "channels"
                left = str(group.size - lost)
                table.add_row(group.name, kind, str(group.size), left, f"{lost / group.size:.0%}")
        for block in self.architecture.blocks:
            if block.removed:
                table.add_row(block.name, "layer", "1", "0", "whole")
        return table

    def _spared(self) -> Table:
        table = _table("Spared")
        table.add_column("group", overflow="fold")
        table.add_column("why", overflow="fold")
        for spared in self.spared:
            table.add_row(spared.group, spared.reason)
        return table


def _printable(text: str) -> str:
    """With plain lines where standard output has no others: a report is not lost to a locale."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace("─", "-")
    return text


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge = False, False
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def spared_of(
    original: PrunedArchitecture, now: PrunedArchitecture, reasons: Sequence[Spared]
) -> tuple[Spared, ...]:
    """Groups that lost nothing, each with its reason, where one is known."""
    known = {spared.group: spared.reason for spared in reasons}
    found = []
    for group in original.groups:
        left = now.group.get(group.name)
        if left is None or left.size < group.original_size:
            continue
        reason = group.reason if not group.prunable else known.get(group.name, "")
        if reason:
            found.append(Spared(group.name, reason))
    return tuple(found)
