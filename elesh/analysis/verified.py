"""A decision after its cut was measured on the network: what was found safe of it, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elesh import safety
from elesh.safety import Entry, Measured, Proposal, Verifier
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Level,
    Outcome,
    PruningGroup,
    PruningStatistics,
    RankedUnit,
    SafetyValidation,
    StructuralPruningDecision,
)

from .candidates import multiple_of
from .cuts import Cut
from .prefixes import restricted, settled
from .rises import with_rises
from .stages import stage
from .verdicts import FALLBACK_DISCOUNT, by_kind, targets_of

__all__ = ["Verified", "verified"]


@dataclass(frozen=True)
class Verified:
    """A decision, and whether its cut should have been measured and could not be."""

    decision: StructuralPruningDecision
    skipped: bool = False


def verified(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    settings: Settings,
    verify: Verifier,
    rounds: int = 1,
) -> Verified:
    """``decision`` as far as ``verify`` measured it to be safe.

    One that is rejected already is not measured. Of groups that would not end at their multiple,
    the units last taken are given back, too.

    Args:
        rounds: in how many the order was chosen.
    """
    if not decision.approved_for_application:
        gates = (*decision.safety.gates, safety.predicted_loss(None, 1.0, 0.0))
        unmeasured = decision.safety.model_copy(update={"gates": gates})
        return Verified(decision.model_copy(update={"safety": unmeasured}))
    proposal = Proposal(
        order=tuple(map(_entry, order)),
        phase=decision.safety.phase,
        predicted_loss_rise=decision.statistics.predicted_loss_rise,
        rounds=rounds,
    )
    with stage("verify"):
        answer = verify(proposal)
    kept = frozenset(answer.kept)
    if len(kept) < len(order):
        safe = [unit for unit in order if _entry(unit) in kept]
        decision = _shortened(bundle, decision, order, safe, settings)
    return Verified(_judged(decision, answer), answer.skipped is not None)


def _entry(unit: RankedUnit) -> Entry:
    return unit.level, unit.layer_name, unit.index


def _confidence(decision: StructuralPruningDecision, answer: Measured) -> float:
    """1 is kept for cuts that were measured."""
    if answer.verification is not None:
        return 1.0
    return decision.safety.confidence * (FALLBACK_DISCOUNT if answer.skipped else 1.0)


def _judged(decision: StructuralPruningDecision, answer: Measured) -> StructuralPruningDecision:
    """The decision with the figures and gates of what was measured."""
    reason = safety.rejection(answer.gates)
    if not reason and not targets_of(decision):
        reason = "verification: no part of the cut was measured as safe"
    found, skipped = answer.verification, answer.skipped
    measured = found is not None
    if found is not None and found.kept:
        rise = decision.statistics.predicted_loss_rise  # of what was kept
        found = found.model_copy(update={"predicted_loss_rise": rise})
    go = Outcome.GO if measured else Outcome.CONDITIONAL_GO
    validation = {
        **dict(decision.safety),
        "gates": (*decision.safety.gates, *answer.gates),
        "outcome": Outcome.NO_GO if reason else go,
        "measured": measured,
        "verification": found,
        "confidence": _confidence(decision, answer),
    }
    fields = {
        **dict(decision),
        "safety": SafetyValidation.model_validate(validation),
        "fallbacks": (*decision.fallbacks, skipped) if skipped else decision.fallbacks,
        "approved_for_application": not reason,
        "rejection_reason": reason,
    }
    return StructuralPruningDecision.model_validate(fields)


def _shortened(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    safe: Sequence[RankedUnit],
    settings: Settings,
) -> StructuralPruningDecision:
    """The decision with the units ``safe`` of its cut only."""
    groups = [bundle.architecture.group[name] for name in decision.units]
    multiples = {group.name: _multiple(bundle, group, settings) for group in groups}
    kept = settled(safe, {group.name: group.size for group in groups}, multiples)
    targets = restricted(targets_of(decision), order, kept, "verification")
    targets = with_rises(bundle, targets)
    first = decision.levels[0].level if decision.levels else decision.key.level
    spared = sum(u.level is first for u in order) - sum(u.level is first for u in kept)
    statistics = _smaller(decision.statistics, Cut.of(bundle, targets), spared)
    return decision.model_copy(update={**by_kind(targets), "statistics": statistics})


def _smaller(statistics: PruningStatistics, cut: Cut, spared: int) -> PruningStatistics:
    """The figures of the smaller cut; the shift was predicted for the larger one and stays."""
    after = cut.after or cut.before
    present, original = statistics.channels_after + spared, statistics.channels_original
    update = {
        "parameters_after": after.parameters,
        "macs_after": after.macs,
        "predicted_loss_rise": cut.loss_rise,
        "channels_after": present,
        "cumulative_ratio": (original - present) / original if original else 0.0,
    }
    return statistics.model_copy(update=update)


def _multiple(bundle: CheckpointBundle, group: PruningGroup, settings: Settings) -> int:
    if group.level is not Level.CHANNEL:
        return group.unit_multiple
    asked = bundle.parameters.round_to
    default = settings.structured_pruning.channel_analysis.round_to
    return multiple_of(group, default if asked == 1 else asked)
