"""Smaller pruning sets: targets without some of their units, and orders merged into one.

Promises: what is left of a target is a sound target (its fields aligned, its size a multiple, its
redundancy pairs those of removed units), and every unit that is kept after all is listed with the
reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence

from elesh.analysis.selection.choose import MAX_NEAR_CUT, Reason
from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    LayerPruningTarget,
    RankedUnit,
    SparedUnit,
)

from .plans import Target

__all__ = ["Identity", "identity_of", "merged", "restricted", "rounded_to_multiples"]

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
    lines = [
        [(height, number, unit) for height, unit in _heights(order)]
        for number, order in enumerate(orders)
    ]
    found = heapq.merge(*lines, key=lambda item: item[:2])
    return tuple(unit for _, _, unit in found)


def _heights(order: Sequence[RankedUnit]) -> Iterable[tuple[float, RankedUnit]]:
    highest = float("-inf")
    for unit in order:
        highest = max(highest, unit.cost)
        yield highest, unit


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
