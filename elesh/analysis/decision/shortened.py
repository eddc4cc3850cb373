"""A decision with some units of its cut only: what verification, or an earlier rollback, leaves.

Promises: what was given back is told as spared, with the reason; sizes and figures are those of the
smaller cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from elesh.analysis.candidates import multiple_of
from elesh.analysis.pruning_set.effects import Cut
from elesh.analysis.pruning_set.loss_increase import with_loss_increases
from elesh.analysis.pruning_set.subsets import restricted, rounded_to_multiples
from elesh.analysis.pruning_set.verdicts import by_kind, targets_of
from elesh.analysis.selection.choose import Reason
from elesh.safety.rolled_back import units_of
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Level,
    PruningGroup,
    PruningStatistics,
    RankedUnit,
    RolledBackCut,
    StructuralPruningDecision,
)

__all__ = ["shortened", "without_taken_back"]


def without_taken_back(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    cuts: Sequence[RolledBackCut],
    settings: Settings,
) -> tuple[StructuralPruningDecision, tuple[RankedUnit, ...]]:
    """The decision without the units of cuts that its trainer took back, and its order.

    Where nothing else is left it stays as it is, to be refused.

    Args:
        cuts: those that are proposed again (:func:`elesh.safety.proposed_again`).
    """
    gone = {unit for cut in cuts for unit in units_of(cut)}
    groups = bundle.architecture.group

    def original(unit: RankedUnit) -> tuple[str, int]:
        name = unit.layer_name
        return name, -1 if unit.level is Level.LAYER else groups[name].origin[unit.index]

    safe = [unit for unit in order if original(unit) not in gone]
    if not gone or not decision.approved_for_application:
        return decision, tuple(order)
    smaller, kept = shortened(bundle, decision, order, safe, settings, "rolled_back")
    return (smaller, kept) if kept else (decision, tuple(order))


def shortened(
    bundle: CheckpointBundle,
    decision: StructuralPruningDecision,
    order: Sequence[RankedUnit],
    safe: Sequence[RankedUnit],
    settings: Settings,
    why: Reason,
) -> tuple[StructuralPruningDecision, tuple[RankedUnit, ...]]:
    """The decision with the units ``safe`` of its cut only, and their order.

    Of groups that would not end at their multiple, the units last taken are given back, too.
    """
    groups = [bundle.architecture.group[name] for name in decision.units]
    multiples = {group.name: _multiple(bundle, group, settings) for group in groups}
    kept = rounded_to_multiples(safe, {group.name: group.size for group in groups}, multiples)
    targets = restricted(targets_of(decision), order, kept, why)
    targets = with_loss_increases(bundle, targets)
    first = decision.levels[0].level if decision.levels else decision.key.level
    spared = sum(u.level is first for u in order) - sum(u.level is first for u in kept)
    statistics = _smaller(
        decision.statistics, Cut.of(bundle, targets, decision.statistics.scorer), spared
    )
    smaller = decision.model_copy(update={**by_kind(targets), "statistics": statistics})
    return smaller, kept


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
