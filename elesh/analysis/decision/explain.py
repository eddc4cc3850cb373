"""A decision as plain rows: targets, units kept near the cut with reasons, gates and figures.

Promises: everything that was asked and not met is a row; the caller only prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from elesh.analysis.importance.scores import single_removal
from elesh.analysis.importance.tracker import ImportanceTracker, Track
from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    LayerPruningTarget,
    Level,
    LevelPart,
    SparedGroup,
    StructuralPruningDecision,
)

_Target = ChannelPruningTarget | AttentionHeadTarget

_REASONS = {
    "minimum": "the group has reached the units it must keep",
    "noise": "inside the noise of the samples",
    "coupling": "goes with a whole layer, or is coupled to what stays",
    "quota": "the quota was used up",
    "budget": "the budget is met without it",
    "rounding": "kept so that the group ends at its multiple",
    "ignored": "ignored by the request",
    "redundancy_cost": "redundant, but would cost more than the most expensive that went",
    "representative": "kept for a redundant one that went",
    "verification": "measured on held-out data, the cut is safe only without it",
    "rolled_back": "of a set that the trainer took back before, for the same evidence",
}


@dataclass(frozen=True)
class UnitExplanation:
    """One channel or head that goes, or is kept near the cut."""

    group: str
    unit: int
    original: int | None
    """Its number in the original network, where known."""
    verdict: Literal["removed", "spared"]
    score: float
    """What it was ranked by: its joint marginal cost, or its mix or magnitude score; for a
    head that goes, what the decision says of its importance."""
    reason: str
    kept: int | None = None
    """The redundancy partner that stays for it."""
    similarity: float | None = None
    single_removal: float | None = None
    """Predicted increase of the loss if it alone went, in nats, where the bundle is at hand."""
    taylor: float | None = None
    magnitude: float | None = None
    frequency: float | None = None
    error: float | None = None
    """Standard error of the score, where units were ranked by output projections."""
    trend: float | None = None
    """Change of its main metric a checkpoint, as a share of its moving average, where a history
    is at hand."""
    stability: float | None = None
    """1 / (1 + variance) of the same metric as a share of its moving average: 1 never moves."""


@dataclass(frozen=True)
class TargetExplanation:
    """One group or layer that loses something."""

    name: str
    level: Level
    before: int
    after: int
    loss_rise: float | None
    """Predicted increase of the loss if it alone lost that much, in nats a sample."""
    loss_rise_error: float | None
    """Its standard error."""


@dataclass(frozen=True)
class Explanation:
    """A decision as rows."""

    key: str
    approved: bool
    reason: str
    figures: tuple[tuple[str, str], ...]
    """Name and value of what the decision does and is predicted to cost."""
    units: tuple[UnitExplanation, ...]
    layers: tuple[LayerPruningTarget, ...]
    """Whole layers that go, with the figures of the five conditions, cheapest first."""
    gates: tuple[GateResult, ...]
    ignored: tuple[tuple[str, str], ...]
    fallbacks: tuple[Fallback, ...]
    targets: tuple[TargetExplanation, ...] = ()
    levels: tuple[LevelPart, ...] = ()
    """Of a joint decision: what became of each level."""


def explain(
    decision: StructuralPruningDecision,
    bundle: CheckpointBundle | None = None,
    tracker: ImportanceTracker | None = None,
) -> Explanation:
    """Explain ``decision``; with its ``bundle`` each unit's own statistics, with a ``tracker`` of
    the run (and the bundle, whose architecture numbers the units) its trend and stability."""
    targets: list[_Target] = [*decision.channels, *decision.attention_heads]
    rows = [row for target in targets for row in _rows(target, bundle)]
    rows += [row for group in decision.spared for row in _spared_rows(group, bundle)]
    if tracker is not None and bundle is not None:
        rows = _with_history(rows, bundle, tracker)
    return Explanation(
        key=decision.idempotency_key,
        approved=decision.approved_for_application,
        reason=decision.rejection_reason,
        figures=tuple(_figures(decision)),
        units=tuple(rows),
        layers=decision.layers,
        gates=decision.safety.gates,
        ignored=decision.ignored,
        fallbacks=decision.fallbacks,
        targets=tuple(map(_target_row, (*targets, *decision.layers))),
        levels=decision.levels,
    )


def _target_row(target: _Target | LayerPruningTarget) -> TargetExplanation:
    if isinstance(target, LayerPruningTarget):
        rise, error = target.predicted_loss_rise, target.predicted_loss_rise_error
        return TargetExplanation(target.layer_name, Level.LAYER, 1, 0, rise, error)
    channels = isinstance(target, ChannelPruningTarget)
    before = (
        target.channels_before if isinstance(target, ChannelPruningTarget) else target.heads_before
    )
    return TargetExplanation(
        target.layer_name,
        Level.CHANNEL if channels else Level.HEAD,
        before,
        before - len(target.indices),
        target.predicted_loss_rise,
        target.predicted_loss_rise_error,
    )


def _rows(target: _Target, bundle: CheckpointBundle | None) -> Iterator[UnitExplanation]:
    partners = {pair.removed: pair for pair in target.redundancy_pairs}
    scores = target.importance if isinstance(target, ChannelPruningTarget) else _head_scores(target)
    units = target.indices
    origins = dict(zip(units, target.original_indices, strict=False))
    errors = dict(zip(units, target.errors, strict=False))
    for unit, score in zip(units, scores, strict=True):
        pair = partners.get(unit)
        row = _row(bundle, target.layer_name, unit, "removed", score, "lowest cost")
        if pair is not None:
            like = f"redundant with {pair.kept} (similarity {pair.similarity:.2f})"
            row = replace(row, reason=like, kept=pair.kept, similarity=pair.similarity)
        yield replace(row, original=origins.get(unit, row.original), error=errors.get(unit))
    yield from _spared_rows(target, bundle)


def _head_scores(target: AttentionHeadTarget) -> tuple[float, ...]:
    """What the heads that go were ranked by; older decisions hold their importance only."""
    if target.costs:
        return target.costs
    known = target.head_importance or (math.nan,) * target.heads_before
    return tuple(known[head] for head in target.head_indices)


def _spared_rows(
    target: _Target | SparedGroup, bundle: CheckpointBundle | None
) -> Iterator[UnitExplanation]:
    for spared in target.spared:
        reason = _REASONS[spared.reason]
        yield _row(bundle, target.layer_name, spared.index, "spared", spared.cost, reason)


def _row(
    bundle: CheckpointBundle | None,
    name: str,
    unit: int,
    verdict: Literal["removed", "spared"],
    score: float,
    reason: str,
) -> UnitExplanation:
    data = bundle.channels.get(name) if bundle else None
    gate = bundle.gates.get(name) if bundle else None
    group = bundle.architecture.group.get(name) if bundle else None
    return UnitExplanation(
        group=name,
        unit=unit,
        original=group.origin[unit] if group else None,
        verdict=verdict,
        score=score,
        reason=reason,
        single_removal=float(single_removal(gate)[unit]) if gate else None,
        taylor=float(data.taylor_importance[unit]) if data else None,
        magnitude=float(data.magnitude_importance[unit]) if data else None,
        frequency=float(data.activation_frequency[unit]) if data else None,
    )


_MAIN_METRIC = {Level.CHANNEL: "taylor", Level.HEAD: "gradient"}


def _with_history(
    rows: Sequence[UnitExplanation], bundle: CheckpointBundle, tracker: ImportanceTracker
) -> list[UnitExplanation]:
    """The rows with trend and stability of every unit that the tracker knows."""
    tracks: dict[str, Track] = {}
    for name in {row.group for row in rows}:
        group = bundle.architecture.group[name]
        if tracker.epochs(group):
            tracks[name] = tracker.track(group)[_MAIN_METRIC[group.level]]
    return [_moving(row, tracks[row.group]) if row.group in tracks else row for row in rows]


def _moving(row: UnitExplanation, track: Track) -> UnitExplanation:
    average = float(track.ema[row.unit])
    if not average > 0:  # never measured, or always zero
        return row
    variance = float(track.variance[row.unit]) / average**2
    trend = float(track.trend[row.unit]) / average
    return replace(row, trend=trend, stability=1 / (1 + variance))


def _figures(decision: StructuralPruningDecision) -> Iterator[tuple[str, str]]:
    s, validation = decision.statistics, decision.safety
    level = f"{decision.levels[0].level if decision.levels else decision.key.level}s"
    yield (
        "phase",
        f"{validation.phase}, up to {s.phase_limit:.1%} of {s.channels_original} {level}",
    )
    if decision.approved_for_application:  # what gates would have allowed is no verdict
        yield "outcome", validation.outcome
    yield "confidence", f"{validation.confidence:.2f}"
    yield "ranked by", f"{s.scorer}, {s.samples} samples"
    yield "quota", f"{s.quota} {level} at this checkpoint"
    if s.shortfall:
        yield "not met", s.shortfall
    yield level, f"{s.channels_before} to {s.channels_after}"
    yield "removed so far", f"{s.cumulative_ratio:.2%} of the original {level}"
    yield "parameters", f"{s.parameters_before:,} to {s.parameters_after:,}"
    yield "MACs", f"{s.macs_before:,} to {s.macs_after:,}"
    if s.predicted_shift is not None:
        error = f" ± {s.predicted_shift_error:.2g}" if s.predicted_shift_error is not None else ""
        yield "predicted shift", f"{s.predicted_shift:.3g}{error} of the outputs' mean square"
    if s.predicted_loss_rise is not None:
        yield "predicted loss increase", f"{s.predicted_loss_rise:+.4g} nats a sample"
