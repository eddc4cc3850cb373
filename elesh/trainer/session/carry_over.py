"""Translates a decision to the network as it is now, by the units' original numbers, or shortens
it.

Between a checkpoint and its answer another cut may be made. Units have names that no cut changes,
so what the decision names can be found again. Promises: nothing goes that the decision did not
name; no more goes than it left, of units, parameters and multiply-accumulates; groups end at
their multiples; the trainer's own check judges the result as that of any decision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any

from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    ContractError,
    Level,
    PrunedArchitecture,
    StructuralPruningDecision,
)

_ALIGNED = ("original_indices", "importance", "costs", "errors")
Target = ChannelPruningTarget | AttentionHeadTarget


def carried_over(
    decision: StructuralPruningDecision, now: PrunedArchitecture
) -> StructuralPruningDecision | None:
    """The decision in the numbering of ``now``, without what is gone already or would be too much;
    None where nothing is left of it."""
    places = _places(decision, now)
    layers = [
        target.layer_name
        for target in decision.layers
        if target.layer_name in now.block
        and now.block[target.layer_name].prunable
        and not now.block[target.layer_name].removed
    ]
    while True:
        units = {target.layer_name: [index for index, _ in own] for target, own in places.items()}
        if not (any(units.values()) or layers):
            return None
        try:
            narrower = now.without({name: own for name, own in units.items() if own})
            after = narrower.without_layers(layers) if layers else narrower
        except ContractError:
            return None
        if not _goes_too_far(decision, narrower, after):
            break
        if not _without_most_expensive(places, now):
            return None  # What is left are whole layers, and they are too much.
    return _of(decision, places, layers, now)


def present_form(
    decision: StructuralPruningDecision, now: PrunedArchitecture
) -> tuple[StructuralPruningDecision, str]:
    """The decision in the numbering of ``now``, and what there is to say of that."""
    if decision.model_hash == now.model_hash:
        return decision, ""
    carried = carried_over(decision, now)
    assert carried is not None, "refused before"
    was, left = (sum(map(len, each.units.values())) for each in (decision, carried))
    return carried, f"carried over from architecture {decision.model_hash}: {left} of {was} units"


def shortened(
    decision: StructuralPruningDecision,
    now: PrunedArchitecture,
    share: float,
    least: float = 0.0,
    alone: Mapping[str, float] | None = None,
) -> StructuralPruningDecision | None:
    """The cheapest of what a decision removes, at most this share of its units and of its layers.

    Args:
        decision: in the numbering of ``now``.
        least: share of its units that is left whatever they cost.
        alone: what each group's units cost, measured: the share is of the sum of these then, and
            by them it is told which are cheap.

    Returns:
        None where nothing is left of it.
    """
    places = _places(decision, now)
    costs = None if alone is None else _measured_costs(places, alone)

    def left() -> float:
        if costs is None:
            return sum(map(len, places.values()))
        return sum(sum(costs[target][: len(own)]) for target, own in places.items())

    wanted, few = share * left(), least * sum(map(len, places.values()))
    while left() > wanted and sum(map(len, places.values())) > few:
        if not _without_most_expensive(places, now, costs):
            break
    layers = [target.layer_name for target in decision.layers]
    layers = layers[: int(share * len(layers))]
    if not (any(places.values()) or layers):
        return None
    return _of(decision, places, layers, now)


def share_of_costs(
    part: StructuralPruningDecision,
    whole: StructuralPruningDecision,
    now: PrunedArchitecture,
    alone: Mapping[str, float],
) -> float:
    """The share that a part of a decision, the cheapest of each group, has of what it costs.

    Args:
        alone: what each group's units cost, measured.
    """
    costs = _measured_costs(_places(whole, now), alone)
    units = part.units
    taken = sum(sum(own[: len(units.get(t.layer_name, ()))]) for t, own in costs.items())
    return taken / sum(map(sum, costs.values()))


def _measured_costs(
    places: Mapping[Target, list[tuple[int, int]]], alone: Mapping[str, float]
) -> dict[Target, list[float]]:
    """Of each target's units, cheapest first, so that they add up to what it costs alone. A unit
    costs no less than its predecessors."""
    found = {}
    for target, own in places.items():
        costs = _costs(target)
        heights = list(
            accumulate((max(costs[place], 0.0) if costs else 1.0 for _, place in own), max)
        )
        total, whole = sum(heights), alone[target.layer_name]
        found[target] = [whole * (h / total if total > 0 else 1 / len(own)) for h in heights]
    return found


def _of(
    decision: StructuralPruningDecision,
    places: Mapping[Target, list[tuple[int, int]]],
    layers: Collection[str],
    now: PrunedArchitecture,
) -> StructuralPruningDecision:
    """The decision with these units and layers only, in the numbering of ``now``."""
    kept = {id(target): _renumbered(target, own, now) for target, own in places.items() if own}
    update = {
        "model_hash": now.model_hash,
        "channels": tuple(kept[id(t)] for t in decision.channels if id(t) in kept),
        "attention_heads": tuple(kept[id(t)] for t in decision.attention_heads if id(t) in kept),
        "layers": tuple(t for t in decision.layers if t.layer_name in layers),
    }
    return decision.model_copy(update=update)


def _places(
    decision: StructuralPruningDecision, now: PrunedArchitecture
) -> dict[Target, list[tuple[int, int]]]:
    found: dict[Target, list[tuple[int, int]]] = {}
    targets: list[Target] = [*decision.channels, *decision.attention_heads]
    for target in targets:
        group = now.group.get(target.layer_name)
        if group is None or not group.prunable:
            continue
        index_of = {original: index for index, original in enumerate(group.origin)}
        own = [
            (index_of[original], place)
            for place, original in enumerate(target.original_indices)
            if original in index_of
        ]
        excess = -(group.size - len(own)) % group.unit_multiple
        own = _cheapest_first(target, own)
        own = own[: max(len(own) - excess, 0)]
        if own and len(own) < group.size:
            found[target] = own
    return found


def _costs(target: Target) -> tuple[float, ...]:
    return target.importance if isinstance(target, ChannelPruningTarget) else target.costs


def _cheapest_first(target: Target, own: list[tuple[int, int]]) -> list[tuple[int, int]]:
    costs = _costs(target)
    return sorted(own, key=lambda item: (costs[item[1]] if costs else 0.0, item[1]))


def _goes_too_far(
    decision: StructuralPruningDecision, narrower: PrunedArchitecture, after: PrunedArchitecture
) -> bool:
    """Whether less would be left than the decision said.

    Args:
        narrower: without its units; those that go with a layer are not counted among them.
        after: without its layers, too.
    """
    planned = decision.statistics
    if after.parameters < planned.parameters_after or after.macs < planned.macs_after:
        return True
    level = Level.CHANNEL if decision.channels else Level.HEAD
    groups = [group for group in narrower.groups if group.level is level and group.prunable]
    first = decision.levels[0].level if decision.levels else decision.key.level
    return first is level and sum(group.size for group in groups) < planned.channels_after


def _without_most_expensive(
    places: Mapping[Target, list[tuple[int, int]]],
    now: PrunedArchitecture,
    measured: Mapping[Target, list[float]] | None = None,
) -> bool:
    """Leave out a twentieth of the units, the most expensive of their groups; False where none is
    left."""

    def cost(target: Target, own: list[tuple[int, int]]) -> float:
        if measured is not None:
            return measured[target][len(own) - 1]
        return _costs(target)[own[-1][1]] if _costs(target) else 0.0

    for _ in range(max(1, sum(map(len, places.values())) // 20)):
        last = {target: cost(target, own) for target, own in places.items() if own}
        if not last:
            return False
        costliest = max(last, key=lambda target: last[target])
        del places[costliest][-now.group[costliest.layer_name].unit_multiple :]
    return True


def _renumbered(target: Target, own: list[tuple[int, int]], now: PrunedArchitecture) -> Target:
    """The target with the units ``own`` only, in present numbering."""
    own = sorted(own)
    group = now.group[target.layer_name]
    fields: dict[str, Any] = dict(target)
    for name in _ALIGNED:
        listed = fields.get(name)
        if listed:
            fields[name] = tuple(listed[place] for _, place in own)
    kind = "channel" if isinstance(target, ChannelPruningTarget) else "head"
    fields[f"{kind}_indices"] = tuple(index for index, _ in own)
    fields[f"{kind}s_before"], fields[f"{kind}s_after"] = group.size, group.size - len(own)
    fields["redundancy_pairs"], fields["spared"] = (), ()
    if isinstance(target, AttentionHeadTarget):  # Figures of all heads, as they were then.
        fields["head_importance"], fields["attention_entropy"] = (), ()
    return type(target).model_validate(fields)
