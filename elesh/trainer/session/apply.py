"""Applying a decision, measured twice: mask, evaluate, then cut, or take the mask off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from elesh.observe import span
from elesh.settings import RollbackTriggers
from elesh.trainer.surgery.reconstruction import Moments
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    ContractError,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
)

__all__ = ["Evaluation", "apply_decision", "outcome_of", "refusal", "trigger_of"]

Evaluate = Callable[[], "Evaluation"]


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
    evaluate: Evaluate,
    *,
    triggers: RollbackTriggers | None = None,
    redistribute: Callable[[], Moments] | None = None,
    take_back: Callable[[], object] | None = None,
) -> PruningOutcome:
    """Mask what the decision names, evaluate, and cut only if accuracy holds; evaluate again.

    A decision that was not approved, or that speaks of another architecture than the present one
    (an earlier cut came between), changes nothing. A drop of accuracy beyond the trigger (of
    several levels, the strictest) takes the mask off, or the cut back: the network is then bit for
    bit what it was. What the surgeon refuses (an optimizer or an average of the network that it was
    not given, state that cannot be kept) is the outcome ``refused`` with the reason.

    Args:
        redistribute: called just before the cut for the moments that the consumers are re-solved
            with (``lambda: recorder.moments(batches, decision.units)``). The mask is evaluated
            without them, the cut with them.
        take_back: takes a cut back; by default ``surgeon.undo``, for which the surgeon must keep
            restore points (otherwise the cut is not judged again).

    Returns:
        The outcome, with accuracy and loss before, under the mask and after the cut, where they
        were measured.
    """
    refused = refusal(decision, surgeon.architecture)
    if refused is not None:
        return refused
    if blocked := surgeon.blocked():
        now = surgeon.architecture
        return outcome_of(decision, now, now, "refused", blocked)
    before, limit = surgeon.architecture, trigger_of(decision, triggers or RollbackTriggers())
    with span("evaluate"):
        plain = evaluate()
    try:
        masked = _evaluate_masked(decision, surgeon, evaluate)
    except ContractError as error:
        return outcome_of(decision, before, before, "refused", str(error), plain)
    if not plain.accuracy - masked.accuracy <= limit:  # NaN rolls back too
        reason = _fell(plain, masked, limit, "under the mask")
        return outcome_of(decision, before, before, "rolled_back", reason, plain, masked)
    moments = redistribute() if redistribute else None
    try:
        with span("cut"):
            _cut(decision, surgeon, moments)
        with span("evaluate cut"):
            after = evaluate()
    except ContractError as error:
        _back(surgeon, before, take_back)
        return outcome_of(decision, before, before, "refused", str(error), plain, masked)
    except BaseException:
        _back(surgeon, before, take_back)
        raise
    if not plain.accuracy - after.accuracy <= limit and _back(surgeon, before, take_back):
        reason = _fell(plain, after, limit, "after the cut")
        return outcome_of(decision, before, before, "rolled_back", reason, plain, masked, after)
    now = surgeon.architecture
    said = "; ".join(surgeon.notes)
    return outcome_of(decision, before, now, "applied", said, plain, masked, after)


def refusal(decision: StructuralPruningDecision, now: PrunedArchitecture) -> PruningOutcome | None:
    """The outcome of a decision that is not to be applied to this network; None if it is."""
    if not decision.approved_for_application:
        return outcome_of(decision, now, now, "rejected", decision.rejection_reason)
    if decision.model_hash != now.model_hash:
        stale = f"stale: decided for architecture {decision.model_hash}, now {now.model_hash}"
        return outcome_of(decision, now, now, "refused", stale)
    return None


def trigger_of(decision: StructuralPruningDecision, triggers: RollbackTriggers) -> float:
    """The drop of accuracy that is too much: the strictest of the levels that lose something."""
    drops = (
        (triggers.channel_accuracy_drop, decision.channels),
        (triggers.head_accuracy_drop, decision.attention_heads),
        (triggers.layer_accuracy_drop, decision.layers),
    )
    return min((drop for drop, targets in drops if targets), default=triggers.channel_accuracy_drop)


def outcome_of(
    decision: StructuralPruningDecision,
    before: PrunedArchitecture,
    after: PrunedArchitecture,
    result: Literal["applied", "rolled_back", "refused", "rejected"],
    detail: str,
    plain: Evaluation | None = None,
    masked: Evaluation | None = None,
    cut: Evaluation | None = None,
) -> PruningOutcome:
    """The outcome with its figures."""
    figures: dict[str, Any] = {}
    for name, evaluation in (("before", plain), ("masked", masked), ("after", cut)):
        if evaluation is not None:
            figures[f"accuracy_{name}"] = evaluation.accuracy
            figures[f"loss_{name}"] = evaluation.loss
    return PruningOutcome(
        idempotency_key=decision.idempotency_key,
        run_id=decision.run_id,
        epoch=decision.epoch,
        result=result,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        detail=detail,
        **figures,
    )


def _evaluate_masked(
    decision: StructuralPruningDecision, surgeon: Surgeon, evaluate: Evaluate
) -> Evaluation:
    try:
        with span("mask"):
            surgeon.mask(decision.units)
            surgeon.mask_layers(target.layer_name for target in decision.layers)
        with span("evaluate masked"):
            return evaluate()
    finally:
        surgeon.unmask()


def _cut(decision: StructuralPruningDecision, surgeon: Surgeon, moments: Moments | None) -> None:
    layers = [target.layer_name for target in decision.layers]
    epoch, key = decision.epoch, decision.idempotency_key
    if decision.units or not layers:
        surgeon.cut(decision.units, epoch=epoch, key=key, redistribute=moments)
    if layers:
        surgeon.cut_layers(layers, epoch=epoch, key=key)


def _back(
    surgeon: Surgeon,
    before: PrunedArchitecture,
    take_back: Callable[[], object] | None,
) -> bool:
    """Take a cut back if that is possible."""
    if take_back is not None:
        take_back()
        return True
    return surgeon.undo_to(before)


def _fell(plain: Evaluation, now: Evaluation, limit: float, when: str) -> str:
    fell = f"accuracy {plain.accuracy:.4f} fell to {now.accuracy:.4f} {when}"
    return f"{fell}, more than {limit:g}"
