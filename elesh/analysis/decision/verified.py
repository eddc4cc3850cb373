"""What the network is measured for: how much of a draft's cut is safe; and, in the preparation
phase, how good predictions are, by cuts that are only measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elesh import safety
from elesh.analysis.levels.units import select_channels
from elesh.analysis.pruning_set.draft import FALLBACK_DISCOUNT, Draft, loss_rise
from elesh.analysis.selection.schedule import counted_groups
from elesh.analysis.spans import stage
from elesh.safety import Entry, Measured, Probing, Proposal, Verifier
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Fallback,
    InvalidField,
    Level,
    Outcome,
    RankedUnit,
    Reconstructed,
    RolledBackCut,
    WouldBeCut,
)

__all__ = ["CalibrationProbe", "calibration_probe", "verify", "without_rolled_back"]


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
        draft.reconstruction = Reconstructed(
            applied=True, skip=asked.skip, batch_statistics=asked.batch_statistics
        )
    draft.gates += answer.gates
    draft.fallbacks += (*((answer.skipped,) if answer.skipped else ()), *answer.fallbacks)
    draft.outcome = Outcome.CONDITIONAL_GO if found is None else Outcome.GO
    failed = safety.rejection(answer.gates)
    if not failed and not draft.targets:
        failed = "verification: no part of the cut was measured as safe"
    if failed:
        draft.refuse(failed)


_TIMES = (0.5, 1.0, 1.5, 2.0)
"""Of the share that the aggressive phase may remove."""


@dataclass(frozen=True)
class CalibrationProbe:
    """What was measured; or why nothing was."""

    cuts: tuple[WouldBeCut, ...] = ()
    skipped: Fallback | None = None


@stage("calibrate")
def calibration_probe(
    bundle: CheckpointBundle, settings: Settings, network: Probing
) -> CalibrationProbe:
    """The first channels to go, up to twice as many as may be removed in all, predicted and
    measured. (Small cuts of a network that still trains cost too little to compare.)

    Nothing where the statistics give no predicted loss increase.
    """
    limit = settings.structured_pruning.safety_schedule.aggressive_limit
    total = sum(group.size for group in counted_groups(bundle.architecture, Level.CHANNEL))
    found: list[WouldBeCut] = []
    for count in sorted({round(min(1.0, limit * each) * total) for each in _TIMES} - {0}):
        units = _first(bundle, settings, count)
        predicted = loss_rise(bundle, units)
        if predicted is None:
            break
        entries = [(Level.CHANNEL, name, unit) for name, own in units.items() for unit in own]
        measured = network.loss_rise(entries)
        if isinstance(measured, Fallback):
            return CalibrationProbe(skipped=measured)
        found.append(WouldBeCut(units=len(entries), predicted=predicted.mean, measured=measured))
    return CalibrationProbe(tuple(found))


def _first(bundle: CheckpointBundle, settings: Settings, count: int) -> dict[str, tuple[int, ...]]:
    """The channels that would go first; none where the request asks for what is not there."""
    channels = settings.structured_pruning.channel_analysis
    try:
        return select_channels(bundle, count, settings=channels)
    except InvalidField:  # The analysis of the level says so.
        return {}
