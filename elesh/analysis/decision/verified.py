"""A decision after its cut was measured on the network: what was found safe of it, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elesh import safety
from elesh.analysis.pruning_set.verdicts import FALLBACK_DISCOUNT, targets_of
from elesh.analysis.spans import stage
from elesh.safety import Entry, Measured, Proposal, Verifier
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Outcome,
    RankedUnit,
    Reconstructed,
    SafetyValidation,
    StructuralPruningDecision,
)

from .shortened import shortened

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
        loss_factor=decision.loss_factor,
    )
    with stage("verify"):
        answer = verify(proposal)
    kept = frozenset(answer.kept)
    if len(kept) < len(order):
        safe = [unit for unit in order if _entry(unit) in kept]
        decision, _ = shortened(bundle, decision, order, safe, settings, "verification")
    asked = bundle.parameters.reconstruction
    if asked is not None and answer.reconstruction is None and decision.units:
        # Nothing was measured: the trainer's own check is of the refitted network.
        answer = replace(answer, reconstruction=Reconstructed(applied=True, skip=asked.skip))
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
        "fallbacks": (
            *decision.fallbacks,
            *([skipped] if skipped else []),
            *answer.fallbacks,
        ),
        "reconstruction": answer.reconstruction,
        "approved_for_application": not reason,
        "rejection_reason": reason,
    }
    return StructuralPruningDecision.model_validate(fields)
