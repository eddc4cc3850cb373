"""Explains a decision: in one sentence, and as tables for the command line.

Promises: sentences are pure, made from the fields of decision and outcomes, and the same for
terminal and console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from elesh.analysis import ImportanceTracker, TargetExplanation, UnitExplanation, explain
from elesh.bus import BreakerView
from elesh.observe.logs import moment
from elesh.observe.terminal import escape
from leyline import (
    CheckpointBundle,
    GateResult,
    LayerPruningTarget,
    LevelPart,
    PruningOutcome,
    StructuralPruningDecision,
)

from .tables import compact

_BRIEF_UNITS, _MOST_UNITS = 8, 300
_BRIEF_REASONS = 3


def print_decision(
    console: Console,
    decision: StructuralPruningDecision,
    bundle: CheckpointBundle | None = None,
    tracker: ImportanceTracker | None = None,
    *,
    whole: bool = True,
) -> None:
    """A decision for people: verdict, figures, what goes and why, what is kept near the cut, gates.

    Args:
        whole: every unit and every gate; else what fits on about a screen, with failed gates only.
    """
    found = explain(decision, bundle, tracker)
    verdict = "[green]approved[/]" if found.approved else "[yellow]rejected[/]"
    console.print(f"[bold]{found.key}[/]  {verdict}")
    console.print(f"  {escape(summary(decision))}", soft_wrap=True)
    figures = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in found.figures:
        figures.add_row(name, escape(value))
    console.print(figures)
    shown = _MOST_UNITS if whole else _BRIEF_UNITS
    units = _units(found.units[:shown])
    for table in (
        _levels(found.levels),
        _targets(found.targets),
        *units,
        _layers(found.layers),
    ):
        if table.row_count:
            console.print("", table, sep="\n")
    if len(found.units) > shown:
        more = "--json has" if whole else "--all shows"
        console.print(f"  and {len(found.units) - shown} units more ({more} them)")
    failed = [gate for gate in found.gates if not gate.passed]
    if whole or failed:
        console.print("", _gates(found.gates if whole else failed), "", sep="\n")
    if not whole:
        console.print(f"  {len(found.gates) - len(failed)} of {len(found.gates)} gates passed")
    ignored = found.ignored if whole else found.ignored[:_BRIEF_REASONS]
    for name, reason in ignored:
        console.print(f"  left alone: [bold]{escape(name)}[/]: {escape(reason)}", soft_wrap=True)
    if len(found.ignored) > len(ignored):
        console.print(f"  and {len(found.ignored) - len(ignored)} groups more left alone")
    for fallback in found.fallbacks:
        console.print(f"  [yellow]fallback {escape(fallback.rung)}[/]: {escape(fallback.reason)}")


def _levels(parts: Iterable[LevelPart]) -> Table:
    names = ("level", "verdict", "quota", "shift", "reason")
    table = compact(*names, figures=("quota", "shift"), title="Levels")
    for part in parts:
        s = part.statistics
        colour = "green" if part.verdict == "taken" else "yellow"
        shift = "" if s is None or s.predicted_shift is None else f"{s.predicted_shift:.3g}"
        verdict = f"[{colour}]{part.verdict}[/]"
        table.add_row(part.level, verdict, str(s.quota) if s else "", shift, escape(part.reason))
    return table


def _targets(targets: Iterable[TargetExplanation]) -> Table:
    figures = ("before", "after", "predicted loss increase")
    table = compact("group", "level", *figures, figures=figures, title="What goes")
    for target in targets:
        rise, error = target.loss_rise, target.loss_rise_error
        rises = "" if rise is None else f"{rise:+.3g}" + (f" ± {error:.1g}" if error else "")
        counts = (str(target.before), str(target.after))
        table.add_row(escape(target.name), target.level, *counts, rises)
    return table


_FIGURES: dict[str, Callable[[UnitExplanation], float | None]] = {
    "alone": lambda row: row.single_removal,
    "trend": lambda row: row.trend,
    "stability": lambda row: row.stability,
}
"""Figures of a unit that are known only with the bundle, or the run's history, at hand."""


def _units(rows: Sequence[UnitExplanation]) -> Iterator[Table]:
    """A table for each group, so that long names of groups leave room for the figures."""
    known = [name for name, of in _FIGURES.items() if any(of(row) is not None for row in rows)]
    numbers = ("unit", "was", "score", *known)
    for group, units in groupby(rows, lambda row: row.group):
        columns = ("unit", "was", "verdict", "score", *known, "reason")
        table = compact(*columns, figures=numbers, title=f"Units of {escape(group)}")
        for row in units:
            figures = [_FIGURES[name](row) for name in known]
            table.add_row(
                str(row.unit),
                "" if row.original is None else str(row.original),
                f"[red]{row.verdict}[/]" if row.verdict == "removed" else row.verdict,
                f"{row.score:.3g}" + ("" if row.error is None else f" ± {row.error:.1g}"),
                *("" if figure is None else f"{figure:+.3g}" for figure in figures),
                escape(row.reason),
            )
        yield table


def _layers(targets: Iterable[LayerPruningTarget]) -> Table:
    figures = ("Taylor", "gradient flow", "similarity", "skip potential", "impact")
    table = compact("layer", *figures, figures=figures, title="Layers")
    for target in targets:
        table.add_row(
            escape(target.layer_name),
            f"{target.importance:.4g}",
            f"{target.gradient_flow:.4g}",
            f"{target.similarity:.4g}",
            f"{target.skip_potential:.4g} ({target.skip_strategy})",
            f"{target.architecture_impact:.4g}",
        )
    return table


def _gates(gates: Iterable[GateResult]) -> Table:
    names = ("gate", "verdict", "measured", "limit", "detail")
    table = compact(*names, figures=("measured", "limit"), whole=("gate",), title="Safety gates")
    for gate in gates:
        table.add_row(
            escape(gate.name),
            "[green]passed[/]" if gate.passed else "[red]failed[/]",
            "" if gate.measured is None else f"{gate.measured:.4g}",
            "" if gate.limit is None else f"{gate.limit:.4g}",
            escape(gate.detail),
        )
    return table


def breaker_table(views: Sequence[BreakerView]) -> Table:
    """Breakers with their state."""
    names = ("run", "level", "state", "failures", "opened at", "reason")
    table = compact(*names, figures=("failures",))
    colours = {"open": "red", "half_open": "yellow", "closed": "green"}
    for view in views:
        table.add_row(
            escape(view.run_id),
            view.level.value,
            f"[{colours[view.state]}]{view.state}[/]",
            str(view.failures),
            moment(view.opened_at) if view.opened_at else "",
            escape(view.reason),
        )
    return table


_LEVELS = ("channel", "head", "layer", "joint")


def result_of(decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome]) -> str:
    """What became of it: a result of the trainer, or ``approved`` or ``rejected``."""
    if outcomes:
        return str(outcomes[-1].result)
    return "approved" if decision.approved_for_application else "rejected"


def gate_parts(name: str) -> tuple[str, str]:
    """A gate's level, empty for one of the whole decision, and its own name."""
    level, dot, gate = name.partition(".")
    return (level if level != "joint" else "", gate) if dot and level in _LEVELS else ("", name)


def reasons(decision: StructuralPruningDecision) -> str:
    """Why a decision was rejected, each reason once with the levels that it holds for."""
    if decision.approved_for_application:
        return ""
    found: dict[str, list[str]] = {}
    for gate in decision.safety.gates:
        if not gate.passed:
            level, _ = gate_parts(gate.name)
            found.setdefault(_detail(gate), []).extend([level] if level else [])
    if not found:
        return decision.rejection_reason
    return "; ".join(
        f"{_listed([f'{level}s' for level in levels])}: {text}" if levels else text
        for text, levels in found.items()
    )


def removed(decision: StructuralPruningDecision) -> str:
    """What a decision removes, by level: ``30 channels and 2 heads``."""
    counts = {
        "channel": sum(len(target.channel_indices) for target in decision.channels),
        "head": sum(len(target.head_indices) for target in decision.attention_heads),
        "layer": len(decision.layers),
    }
    parts = [f"{n} {name}{'s' if n != 1 else ''}" for name, n in counts.items() if n]
    return _listed(parts) or "nothing"


def savings(decision: StructuralPruningDecision) -> str:
    """What removing it saves: parameters and MACs, with their shares."""
    s = decision.statistics
    return ", ".join(
        f"{before - after:,} {name} ({_share(before, after)}) fewer"
        for name, before, after in (
            ("parameters", s.parameters_before, s.parameters_after),
            ("MACs a sample", s.macs_before, s.macs_after),
        )
    )


def summary(decision: StructuralPruningDecision) -> str:
    """The sentence of a decision by itself, whatever its trainer made of it."""
    if not decision.approved_for_application:
        return f"Rejected, nothing is removed: {reasons(decision)}."
    return f"Approved: removes {removed(decision)}: {savings(decision)}."


def verdict(decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome] = ()) -> str:
    """The sentence; ``outcomes`` are what the trainer said, oldest first."""
    result = result_of(decision, outcomes)
    if not decision.approved_for_application:
        return summary(decision)
    cut = f"{removed(decision)}: {savings(decision)}"
    detail = outcomes[-1].detail if outcomes else ""
    if result == "applied":
        sentence = (
            f"Applied: removes {cut}{_really(decision, outcomes[0])}{_accuracy(outcomes[0])}."
        )
        return f"{sentence} {detail[:1].upper()}{detail[1:]}." if detail else sentence
    if result == "rolled_back":
        return f"Applied and then taken back: {detail or 'the trainer gave no reason'}."
    if result in ("refused", "rejected"):
        return f"Approved, but the trainer did not take it: {detail or 'no reason was given'}."
    return f"Approved; the trainer has not answered yet. It would remove {cut}."


def _really(decision: StructuralPruningDecision, outcome: PruningOutcome) -> str:
    """What went, where it is less than was decided: another cut had come between."""
    went = outcome.parameters_before - outcome.parameters_after
    statistics = decision.statistics
    if not 0 < went < statistics.parameters_before - statistics.parameters_after:
        return ""
    return f"; an earlier cut had taken part of it, {went:,} parameters were left to remove"


def _accuracy(outcome: PruningOutcome) -> str:
    # A report that ends a watch (0 checkpoints left) was measured later than the cut.
    after = outcome.accuracy_masked if outcome.watched == 0 else outcome.accuracy_after
    after = outcome.accuracy_masked if after is None else after
    before = outcome.accuracy_before
    if before is None or after is None or before != before or after != after:
        return ""
    return f"; held-out accuracy {before:.2%} before it and {after:.2%} after, by the trainer"


def _detail(gate: GateResult) -> str:
    if gate.detail:
        return gate.detail
    name = gate_parts(gate.name)[1].replace("_", " ")
    if gate.measured is None or gate.limit is None:
        return f"{name} failed"
    return f"{name} is {gate.measured:.4g}, the limit is {gate.limit:.4g}"


def _share(before: int, after: int) -> str:
    return f"{(before - after) / before:.1%}" if before else "0%"


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``, each once."""
    names = list(dict.fromkeys(names))
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
