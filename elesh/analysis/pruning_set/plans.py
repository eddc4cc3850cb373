"""A level's proposal in one form for channels, heads and layers, and smaller sets of it.

A planner of a level takes a bundle and settings and returns a :class:`LevelPlan`; gates, figures
and the verdict come after it and are the same for all levels (:mod:`elesh.analysis.levels`).

Promises: what is left of a target is a sound target (its fields aligned, its size a multiple, its
redundancy pairs those of removed units), and every unit that is kept after all is listed with the
reason.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import Prediction
from elesh.analysis.selection.choose import (
    MAX_NEAR_CUT,
    Choice,
    Reason,
    Scorer,
    Selection,
    groups_near_cut,
)
from elesh.analysis.selection.schedule import (
    Allowance,
    Eligible,
    counted_groups,
    near_the_cut,
    sentence,
    short_of_quota,
    short_of_target,
)
from elesh.settings import Settings
from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    LayerPruningTarget,
    Level,
    PruningGroup,
    RankedUnit,
    SparedGroup,
    SparedUnit,
)

Target = ChannelPruningTarget | AttentionHeadTarget | LayerPruningTarget


@dataclass(frozen=True)
class BudgetUse:
    """What is left of a resource after the cut, as shares of what a network takes."""

    resource: str
    left: float
    at_most: float
    of: str = "present"
    """Of which network."""


@dataclass(frozen=True)
class LevelPlan:
    """The cut that a level proposes, and what the gates have to know about it."""

    level: Level
    allowed: Allowance
    scorer: Scorer
    confidence: float
    """Before fallbacks are counted."""
    fallbacks: tuple[Fallback, ...]
    """Steps down that the statistics forced."""
    ignored: tuple[tuple[str, str], ...]
    """Groups or layers that lose nothing, each with the reason."""
    nothing: str
    """Why nothing is removed, where nothing is."""
    minimum: int
    """Units that each group must keep; layers that the network must keep."""
    present: int
    """Units that are there and count."""
    prunable: int
    """Groups or layers that can lose something."""
    measured: int
    """How many of these have statistics."""
    samples: int
    """Calibration samples behind the statistics."""
    groups: tuple[PruningGroup, ...] = ()
    """Those that can lose units, at the levels that have groups."""
    round_to: int = 1
    targets: tuple[Target, ...] = ()
    order: tuple[RankedUnit, ...] = ()
    """The units of the targets, in the order in which they were chosen."""
    near_cut: tuple[SparedGroup, ...] = ()
    """Groups that lose nothing although some of their units were near the cut."""
    shortfall: str = ""
    """What was asked for or allowed and is not removed."""
    folds: tuple[tuple[RankedUnit, ...], ...] = ()
    """For a shard: the orders that each fold of the samples alone would choose."""
    prediction: Prediction | None = None
    """Where there are output projections of all candidates."""
    output_mean_square: float = 0.0
    """Of the outputs, estimated from the same projections."""
    budget: BudgetUse | None = None
    """How far the cut gets towards a budget, where one was asked for."""


_CONFIDENCE = {
    "output_projection": 0.9,
    "reconstruction": 0.9,
    "fisher": 0.75,
    "multi_metric": 0.6,
    "magnitude": 0.3,
    "margins": 0.9,
}
"""An order, not a probability: 1 is kept for cuts measured on held-out data; projections predict
the outputs, the mix only follows them, magnitude hardly does (measured in ARCHITECTURE)."""


def empty_plan(
    bundle: CheckpointBundle,
    level: Level,
    allowed: Allowance,
    scorer: tuple[Scorer, tuple[Fallback, ...]],
    eligible: Eligible,
    minimum: int,
    round_to: int = 1,
) -> LevelPlan:
    """The plan of a level whose groups lose units one by one, before any is chosen."""
    used, fallbacks = scorer
    groups = counted_groups(bundle.architecture, level)
    known = bundle.gates.keys() | bundle.channels.keys() | bundle.heads.keys()
    counts = [len(gate.projections) for gate in bundle.gates.values()]
    nothing = (
        f"quota 0 ({allowed.removed} of {allowed.original} original {level}s are removed, "
        f"{allowed.share:.2%} may be at this epoch)"
    )
    if not eligible.groups:
        nothing = f"no group can lose {level}s (see ignored)"
    elif allowed.quota:
        nothing = f"no group can lose a whole multiple within quota {allowed.quota}"
    return LevelPlan(
        level=level,
        allowed=allowed,
        scorer=used,
        confidence=_CONFIDENCE[used],
        fallbacks=fallbacks,
        ignored=eligible.ignored,
        nothing=f"nothing to remove: {nothing}",
        minimum=minimum,
        present=sum(group.size for group in groups),
        prunable=len(groups),
        measured=sum(group.name in known for group in groups),
        samples=counts[0] if counts else bundle.metadata.samples,
        groups=eligible.groups,
        round_to=round_to,
        shortfall=short_of_target(bundle, level, allowed),
    )


def with_choice(
    plan: LevelPlan,
    bundle: CheckpointBundle,
    candidates: Candidates,
    choice: Choice,
    targets: Sequence[Target],
) -> LevelPlan:
    """The plan that removes ``targets``, chosen by ``choice``."""
    selection, scale = choice.selection, choice.scale
    plan = replace(plan, scorer=choice.scorer or plan.scorer)

    def order(selection: Selection) -> tuple[RankedUnit, ...]:
        """Units as they were taken, each with its cost in the targets' own unit."""
        costs = selection.marginal_costs
        groups = candidates.group_of[list(costs)].tolist()
        starts = candidates.starts[groups].tolist()
        return tuple(
            RankedUnit(
                level=plan.level,
                layer_name=candidates.names[group],
                index=unit - start,
                cost=cost * scale,
            )
            for (unit, cost), group, start in zip(costs.items(), groups, starts, strict=True)
        )

    ignored = plan.ignored
    if plan.scorer == "output_projection":
        max_cost = selection.removal_order.max_cost * scale
        ignored = tuple(near_the_cut(bundle, plan.level, ignored, max_cost))
    return replace(
        plan,
        targets=tuple(targets),
        order=order(selection),
        ignored=ignored,
        near_cut=groups_near_cut(candidates, choice),
        shortfall=sentence(plan.shortfall, short_of_quota(choice.quota, selection, plan.level)),
        folds=tuple(map(order, choice.folds)),
        prediction=choice.prediction,
        output_mean_square=choice.output_mean_square,
    )


def wanted_scorer(bundle: CheckpointBundle, settings: Settings) -> tuple[str, bool]:
    """The scorer that request or settings ask for (the request wins unless it says ``auto``), and
    whether they say that the consumers of a cut are re-solved."""
    asked, known = bundle.parameters, settings.structured_pruning.channel_analysis
    scorer = known.scorer if asked.scorer == "auto" else asked.scorer
    return scorer, asked.redistribute or known.redistribute


Identity = tuple[str, int]
_ALIGNED = {"channel_indices", "head_indices", "original_indices", "importance", "costs", "errors"}
"""Fields of a target that list something for each unit that goes."""


def identity_of(unit: RankedUnit) -> Identity:
    """Group or layer, and number in it."""
    return unit.layer_name, unit.index


def merged(orders: Iterable[Sequence[RankedUnit]]) -> tuple[RankedUnit, ...]:
    """Several orders as one, cheapest first, each kept in its own order.

    A cost counts from where its order has got to, so no unit may overtake its predecessors: it is
    placed by the highest cost so far. Ties go by the order of ``orders``.
    """
    lines = []
    for number, order in enumerate(orders):
        heights = itertools.accumulate((unit.cost for unit in order), max)
        lines.append([(height, number, unit) for height, unit in zip(heights, order, strict=True)])
    found = heapq.merge(*lines, key=lambda item: item[:2])
    return tuple(unit for _, _, unit in found)


def rounded_to_multiples(
    units: Sequence[RankedUnit], sizes: Mapping[str, int], multiples: Mapping[str, int]
) -> tuple[RankedUnit, ...]:
    """The units, less the last ones of groups that would not end at their multiple.

    Args:
        units: in the order of removal.
        sizes, multiples: of the groups that lose some.
    """
    by_group: dict[str, list[RankedUnit]] = {}
    for unit in units:
        by_group.setdefault(unit.layer_name, []).append(unit)
    back: set[Identity] = set()
    for name, multiple in multiples.items():
        taken = by_group.get(name, [])
        excess = -(sizes[name] - len(taken)) % multiple
        # A group that is no multiple to begin with may not reach the one above: leave it whole.
        given = taken[len(taken) - excess :] if excess <= len(taken) else taken
        back |= {identity_of(unit) for unit in given}
    return tuple(unit for unit in units if identity_of(unit) not in back)


def restricted(
    targets: Iterable[Target],
    order: Collection[RankedUnit],
    kept: Iterable[RankedUnit],
    why: Reason,
) -> tuple[Target, ...]:
    """The targets with only the units ``kept`` of those in ``order``; the others are listed."""
    left = {identity_of(unit) for unit in kept}
    costs = {identity_of(unit): unit.cost for unit in order}
    found: list[Target] = []
    for target in targets:
        indices = (0,) if isinstance(target, LayerPruningTarget) else target.indices
        places = [p for p, index in enumerate(indices) if (target.layer_name, index) in left]
        if len(places) == len(indices):
            found.append(target)
        elif places and not isinstance(target, LayerPruningTarget):
            found.append(_with(target, places, costs, why))
    return tuple(found)


def _with(
    target: ChannelPruningTarget | AttentionHeadTarget,
    places: Sequence[int],
    costs: Mapping[Identity, float],
    why: Reason,
) -> Target:
    """The target with the units at ``places`` only; of the others the cheapest are listed."""
    kept = [target.indices[place] for place in places]
    back = [
        SparedUnit(index=index, cost=costs[target.layer_name, index], reason=why)
        for index in sorted(set(target.indices) - set(kept))
    ]
    near = [*back, *target.spared]
    near = sorted(near, key=lambda unit: (unit.cost, unit.index))[:MAX_NEAR_CUT]
    fields: dict[str, object] = dict(target)
    for name in _ALIGNED & fields.keys():
        listed = getattr(target, name)
        fields[name] = tuple(listed[place] for place in places) if listed else ()
    after = "channels" if isinstance(target, ChannelPruningTarget) else "heads"
    fields[f"{after}_after"] = getattr(target, f"{after}_before") - len(kept)
    fields["redundancy_pairs"] = tuple(p for p in target.redundancy_pairs if p.removed in kept)
    fields["spared"] = tuple(sorted(near, key=lambda unit: unit.index))
    return type(target).model_validate(fields)
