"""Applying a decision, measured twice: mask, evaluate, then cut, or take the mask off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from elesh.observe import span
from elesh.settings import RollbackTriggers
from leyline import Level, PrunedArchitecture, PruningOutcome, StructuralPruningDecision

from .redistribute import Moments
from .surgeon import Surgeon

__all__ = ["Evaluation", "apply_decision"]


@dataclass(frozen=True)
class Evaluation:
    """How well the network does on the trainer's validation data."""

    accuracy: float
    """Share of right answers, 0 to 1."""
    loss: float
    """Mean loss a sample."""


def apply_decision(
    decision: StructuralPruningDecision,
    surgeon: Surgeon,
    evaluate: Callable[[], Evaluation],
    *,
    triggers: RollbackTriggers | None = None,
    redistribute: Callable[[], Moments] | None = None,
) -> PruningOutcome:
    """Mask what the decision names, evaluate, and cut only if accuracy holds.

    A decision that was not approved, or that speaks of another architecture than the present one
    (an earlier cut came between), changes nothing. A drop of accuracy beyond the trigger
    (of several levels, the strictest) takes the mask off: the network is then bit for bit what it
    was.

    Args:
        redistribute: called just before the cut for the moments that the consumers are re-solved
            with (``lambda: recorder.moments(batches, decision.units)``). The mask is evaluated
            without, so what is accepted under it can only get better as far as the moments tell.

    Returns:
        The outcome, with accuracy and loss before and under the mask where they were measured.
    """
    now = surgeon.architecture
    if not decision.approved_for_application:
        return _outcome(decision, now, now, "rejected", decision.rejection_reason)
    if decision.model_hash != now.model_hash:
        stale = f"stale: decided for architecture {decision.model_hash}, now {now.model_hash}"
        return _outcome(decision, now, now, "refused", stale)
    with span("evaluate"):
        plain = evaluate()
    layers = [target.layer_name for target in decision.layers]
    try:
        with span("mask"):
            surgeon.mask(decision.units)
            surgeon.mask_layers(layers)
        with span("evaluate masked"):
            masked = evaluate()
    finally:
        surgeon.unmask()
    limit = min(_trigger(level, triggers or RollbackTriggers()) for level in decision.taken)
    if not plain.accuracy - masked.accuracy <= limit:  # NaN rolls back too
        fell = f"accuracy {plain.accuracy:.4f} fell to {masked.accuracy:.4f} under the mask"
        reason = f"{fell}, more than {limit:g}"
        return _outcome(decision, now, now, "rolled_back", reason, plain, masked)
    with span("cut"):
        epoch, key = decision.epoch, decision.idempotency_key
        if decision.units or not layers:
            moments = redistribute() if redistribute else None
            after = surgeon.cut(decision.units, epoch=epoch, key=key, redistribute=moments)
        if layers:
            after = surgeon.cut_layers(layers, epoch=epoch, key=key)
    return _outcome(decision, now, after, "applied", "", plain, masked)


def _outcome(
    decision: StructuralPruningDecision,
    before: PrunedArchitecture,
    after: PrunedArchitecture,
    result: Literal["applied", "rolled_back", "refused", "rejected"],
    detail: str,
    plain: Evaluation | None = None,
    masked: Evaluation | None = None,
) -> PruningOutcome:
    return PruningOutcome(
        idempotency_key=decision.idempotency_key,
        run_id=decision.run_id,
        epoch=decision.epoch,
        result=result,
        accuracy_before=plain.accuracy if plain else None,
        accuracy_masked=masked.accuracy if masked else None,
        loss_before=plain.loss if plain else None,
        loss_masked=masked.loss if masked else None,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        detail=detail,
    )


def _trigger(level: Level, triggers: RollbackTriggers) -> float:
    return {
        Level.HEAD: triggers.head_accuracy_drop,
        Level.LAYER: triggers.layer_accuracy_drop,
    }.get(level, triggers.channel_accuracy_drop)
