"""What the command line prints: decisions and breakers as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elesh.analysis import UnitExplanation, explain
from elesh.bus import BreakerView
from leyline import (
    CheckpointBundle,
    GateResult,
    LayerPruningTarget,
    StructuralPruningDecision,
)

__all__ = [
    "breaker_table",
    "print_decision",
]


def print_decision(
    console: Console, decision: StructuralPruningDecision, bundle: CheckpointBundle | None = None
) -> None:
    """A decision for people: verdict, figures, what goes and why, what was spared, gates."""
    told = explain(decision, bundle)
    verdict = "[green]approved[/]" if told.approved else "[yellow]rejected[/]"
    console.print(f"[bold]{told.key}[/]  {verdict}")
    if told.reason:
        console.print(f"  because {escape(told.reason)}", soft_wrap=True)
    figures = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in told.figures:
        figures.add_row(name, escape(value))
    console.print(figures)
    if told.units:
        console.print(_units(told.units))
    if told.layers:
        console.print(_layers(told.layers))
    console.print(_gates(told.gates))
    for name, reason in told.ignored:
        console.print(f"  left alone: [bold]{escape(name)}[/]: {escape(reason)}", soft_wrap=True)
    for fallback in told.fallbacks:
        console.print(f"  [yellow]fallback {escape(fallback.rung)}[/]: {escape(fallback.reason)}")


def _units(rows: Iterable[UnitExplanation]) -> Table:
    table = Table(title="Channels", title_justify="left")
    rows = list(rows)
    numbers = {"channel", "original", "score", "alone"}
    # What removing the channel alone does to the loss is known only with the bundle at hand.
    alone = ["alone"] if any(row.single_removal is not None for row in rows) else []
    for name in ("group", "channel", "original", "verdict", "score", *alone, "reason"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(
            escape(row.group),
            str(row.unit),
            "" if row.original is None else str(row.original),
            f"[red]{row.verdict}[/]" if row.verdict == "removed" else row.verdict,
            f"{row.score:.4g}",
            *([f"{row.single_removal or 0.0:+.3g}"] if alone else []),
            escape(row.reason),
        )
    return table


def _layers(targets: Iterable[LayerPruningTarget]) -> Table:
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", "Taylor", "gradient flow", "similarity", "skip potential", "impact"):
        table.add_column(name, justify="left" if name == "layer" else "right")
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
    table = Table(title="Safety gates", title_justify="left")
    for name in ("gate", "verdict", "measured", "limit", "detail"):
        table.add_column(name, justify="right" if name in {"measured", "limit"} else "left")
    for gate in gates:
        table.add_row(
            gate.name,
            "[green]passed[/]" if gate.passed else "[red]failed[/]",
            "" if gate.measured is None else f"{gate.measured:.4g}",
            "" if gate.limit is None else f"{gate.limit:.4g}",
            escape(gate.detail),
        )
    return table


def breaker_table(views: Sequence[BreakerView]) -> Table:
    """Breakers with their state."""
    table = Table("run", "level", "state", "failures", "opened at", "reason")
    colours = {"open": "red", "half_open": "yellow", "closed": "green"}
    for view in views:
        table.add_row(
            escape(view.run_id),
            view.level.value,
            f"[{colours[view.state]}]{view.state}[/]",
            str(view.failures),
            str(view.opened_at or "")[:19],
            escape(view.reason),
        )
    return table
