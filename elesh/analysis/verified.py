"""A decision after its cut was measured: the largest safe prefix, or none."""

from __future__ import annotations

from collections.abc import Sequence

from elesh.safety import Proposal, Verify
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Level,
    Outcome,
    PruningGroup,
    RankedUnit,
    SafetyValidation,
    StructuralPruningDecision,
)

from .candidates import multiple_of
from .cuts import Cut
from .prefixes import restricted, settled
from .verdicts import by_kind, rejection, targets_of

__all__ = ["verified"]


def verified(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    settings: Settings,
    verify: Verify,
) -> StructuralPruningDecision:
    """``decision`` as far as ``verify`` measured it to be safe; one that is rejected already is
    not measured."""
    if not decision.approved_for_application:
        return decision
    answer = verify(
        Proposal(
            units=tuple(order),
            levels=decision.taken,
            phase=decision.safety.phase,
            predicted_loss_rise=decision.statistics.predicted_loss_rise,
        )
    )
    gates = (*decision.safety.gates, answer.gate)
    if not answer.gate.passed or not answer.safe:
        outcome, reason = Outcome.NO_GO, rejection([answer.gate]) or "no part of the cut is safe"
        return _judged(decision, gates, outcome, reason)
    if answer.safe < len(order):
        decision = _shortened(bundle, decision, order, answer.safe, settings)
    reason = "" if targets_of(decision) else "no whole multiple is left of what is safe"
    return _judged(decision, gates, Outcome.NO_GO if reason else Outcome.GO, reason)


def _judged(
    decision: StructuralPruningDecision,
    gates: Sequence[object],
    outcome: Outcome,
    reason: str,
) -> StructuralPruningDecision:
    safety = {**dict(decision.safety), "gates": tuple(gates), "outcome": outcome, "measured": True}
    fields = {
        **dict(decision),
        "safety": SafetyValidation.model_validate(safety),
        "approved_for_application": not reason,
        "rejection_reason": reason,
    }
    return StructuralPruningDecision.model_validate(fields)


def _shortened(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    count: int,
    settings: Settings,
) -> StructuralPruningDecision:
    """The decision with the first ``count`` units of its cut only."""
    groups = [bundle.architecture.group[name] for name in decision.units]
    multiples = {group.name: _multiple(bundle, group, settings) for group in groups}
    kept = settled(order, count, {g.name: g.size for g in groups}, multiples)
    targets = restricted(targets_of(decision), order, kept, "verification")
    cut, statistics = Cut.of(bundle, targets), decision.statistics
    first = decision.taken[0]
    lost = sum(u.level is first for u in order) - sum(u.level is first for u in kept)
    after = cut.after or cut.before
    update: dict[str, object] = {
        "parameters_after": after.parameters,
        "macs_after": after.macs,
        "predicted_loss_rise": cut.loss_rise,
    }
    if first is (decision.levels[0].level if decision.levels else decision.key.level):
        present = statistics.channels_after + lost
        original = statistics.channels_original
        gone = statistics.channels_original - present
        update |= {"channels_after": present, "cumulative_ratio": gone / original}
    return decision.model_copy(
        update={
            **by_kind(targets),
            "statistics": statistics.model_copy(update=update),
        }
    )


def _multiple(bundle: CheckpointBundle, group: PruningGroup, settings: Settings) -> int:
    if group.level is not Level.CHANNEL:
        return group.unit_multiple
    asked = bundle.parameters.round_to
    default = settings.structured_pruning.channel_analysis.round_to
    return multiple_of(group, default if asked == 1 else asked)
