"""A draft after its cut was measured on the network: what was found safe of it, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elesh import safety
from elesh.analysis.pruning_set.draft import FALLBACK_DISCOUNT, Draft
from elesh.analysis.spans import stage
from elesh.safety import Entry, Measured, Proposal, Verifier
from leyline import Level, Outcome, RankedUnit, Reconstructed, RolledBackCut

__all__ = ["verify", "without_rolled_back"]


def without_rolled_back(draft: Draft, cuts: Sequence[RolledBackCut]) -> Draft:
    """The draft without the units of cuts that the trainer rolled back.

    Where nothing else is left it stays as it is, to be refused.

    Args:
        cuts: those that are proposed again (:func:`elesh.safety.proposed_again`).
    """
    gone = {unit for cut in cuts for unit in safety.units_of(cut)}
    if not gone or not draft.approved:
        return draft
    groups = draft.bundle.architecture.group

    def original(unit: RankedUnit) -> tuple[str, int]:
        name = unit.layer_name
        return name, -1 if unit.level is Level.LAYER else groups[name].origin[unit.index]

    smaller = replace(draft)
    smaller.keep([unit for unit in draft.order if original(unit) not in gone], "rolled_back")
    return smaller if smaller.order else draft


def verify(draft: Draft, verifier: Verifier, rounds: int = 1) -> bool:
    """Shorten the draft to what ``verifier`` measured as safe, and judge it by the figures.

    A draft that is rejected already is not measured.

    Args:
        rounds: in how many the order was chosen.

    Returns:
        Whether the cut was measured, or need not be; False where it could not be.
    """
    if not draft.approved:
        draft.gates += (safety.predicted_loss(None, 1.0, 0.0),)
        return True
    proposal = Proposal(
        order=tuple(map(_entry, draft.order)),
        phase=draft.phase,
        predicted_loss_rise=draft.statistics.predicted_loss_rise,
        rounds=rounds,
        loss_factor=draft.loss_factor,
    )
    with stage("verify"):
        answer = verifier(proposal)
    kept = frozenset(answer.kept)
    if len(kept) < len(draft.order):
        draft.keep([unit for unit in draft.order if _entry(unit) in kept], "verification")
    _judge(draft, answer)
    return answer.skipped is None


def _entry(unit: RankedUnit) -> Entry:
    return unit.level, unit.layer_name, unit.index


def _judge(draft: Draft, answer: Measured) -> None:
    """Give the draft the figures, gates and verdict of what was measured."""
    found, asked = answer.verification, draft.bundle.parameters.reconstruction
    if found is None:  # Confidence 1 is kept for cuts that were measured.
        draft.confidence *= FALLBACK_DISCOUNT if answer.skipped else 1.0
    else:
        draft.confidence = 1.0
        if found.kept:
            rise = draft.statistics.predicted_loss_rise  # of what was kept
            found = found.model_copy(update={"predicted_loss_rise": rise})
    draft.verification, draft.reconstruction = found, answer.reconstruction
    if asked is not None and answer.reconstruction is None and draft.units:
        # Nothing was measured: the trainer's own check is of the refitted network.
        draft.reconstruction = Reconstructed(applied=True, skip=asked.skip)
    draft.gates += answer.gates
    draft.fallbacks += (*((answer.skipped,) if answer.skipped else ()), *answer.fallbacks)
    draft.outcome = Outcome.CONDITIONAL_GO if found is None else Outcome.GO
    failed = safety.rejection(answer.gates)
    if not failed and not draft.targets:
        failed = "verification: no part of the cut was measured as safe"
    if failed:
        draft.refuse(failed)
