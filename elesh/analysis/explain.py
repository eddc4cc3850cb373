"""A decision in plain rows: what goes and why, what was spared and why, gates and figures.

Promises: everything that was asked and not met is a row; the caller only prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    LayerPruningTarget,
    StructuralPruningDecision,
)

from .scores import single_removal

__all__ = ["Explanation", "UnitExplanation", "explain"]

_Target = ChannelPruningTarget | AttentionHeadTarget

_REASONS = {
    "minimum": "the group has reached the units it must keep",
    "noise": "inside the noise of the samples",
    "coupling": "coupled to units that must stay",
    "quota": "the quota was used up",
    "rounding": "given back so that the group ends at its multiple",
    "ignored": "ignored by the request",
    "redundancy_cost": "redundant, but removing it would cost more than the dearest that went",
    "representative": "kept for a redundant one that went",
}


@dataclass(frozen=True)
class UnitExplanation:
    """One channel or head that goes or was spared near the cut."""

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
    """Predicted rise of the loss if it alone went, in nats, where the bundle is at hand."""
    taylor: float | None = None
    magnitude: float | None = None
    frequency: float | None = None


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


def explain(
    decision: StructuralPruningDecision, bundle: CheckpointBundle | None = None
) -> Explanation:
    """Explain ``decision``; with its ``bundle``, each unit's own statistics as well."""
    targets: list[_Target] = [*decision.channels, *decision.attention_heads]
    rows = [row for target in targets for row in _rows(target, bundle)]
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
    )


def _rows(target: _Target, bundle: CheckpointBundle | None) -> Iterator[UnitExplanation]:
    partners = {pair.removed: pair for pair in target.redundancy_pairs}
    if isinstance(target, ChannelPruningTarget):
        units, scores = target.channel_indices, target.importance
    else:
        units = target.head_indices
        known = target.head_importance or (math.nan,) * target.heads_before
        scores = tuple(known[head] for head in units)
    origins = dict(zip(units, target.original_indices, strict=False))
    for unit, score in zip(units, scores, strict=True):
        pair = partners.get(unit)
        reason = "lowest cost" if pair is None else f"redundant with {pair.kept}"
        yield _row(
            bundle,
            target,
            unit,
            "removed",
            score,
            reason,
            origins.get(unit),
            None if pair is None else pair.kept,
            None if pair is None else pair.similarity,
        )
    for spared in target.spared:
        yield _row(bundle, target, spared.index, "spared", spared.cost, _REASONS[spared.reason])


def _row(
    bundle: CheckpointBundle | None,
    target: _Target,
    unit: int,
    verdict: Literal["removed", "spared"],
    score: float,
    reason: str,
    original: int | None = None,
    kept: int | None = None,
    similarity: float | None = None,
) -> UnitExplanation:
    name = target.layer_name
    data = bundle.channels.get(name) if bundle else None
    gate = bundle.gates.get(name) if bundle else None
    group = bundle.architecture.group.get(name) if bundle else None
    return UnitExplanation(
        group=name,
        unit=unit,
        original=group.origin[unit] if original is None and group else original,
        verdict=verdict,
        score=score,
        reason=reason,
        kept=kept,
        similarity=similarity,
        single_removal=float(single_removal(gate)[unit]) if gate else None,
        taylor=float(data.taylor_importance[unit]) if data else None,
        magnitude=float(data.magnitude_importance[unit]) if data else None,
        frequency=float(data.activation_frequency[unit]) if data else None,
    )


def _figures(decision: StructuralPruningDecision) -> Iterator[tuple[str, str]]:
    s, validation, level = decision.statistics, decision.safety, f"{decision.key.level}s"
    yield (
        "phase",
        f"{validation.phase}, up to {s.phase_limit:.1%} of {s.channels_original} {level}",
    )
    yield "outcome", validation.outcome
    yield "confidence", f"{validation.confidence:.2f}"
    yield "ranked by", f"{s.scorer}, {s.samples} samples"
    yield "quota", f"{s.quota} {level} at this checkpoint"
    yield level, f"{s.channels_before} to {s.channels_after}"
    yield "removed so far", f"{s.cumulative_ratio:.2%} of the original {level}"
    yield "parameters", f"{s.parameters_before:,} to {s.parameters_after:,}"
    yield "MACs", f"{s.macs_before:,} to {s.macs_after:,}"
    if s.predicted_shift is not None:
        error = f" ± {s.predicted_shift_error:.2g}" if s.predicted_shift_error is not None else ""
        yield "predicted shift", f"{s.predicted_shift:.3g}{error} of the outputs' mean square"
    if s.predicted_loss_rise is not None:
        yield "predicted loss rise", f"{s.predicted_loss_rise:+.4g} nats a sample"
