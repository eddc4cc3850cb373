"""Converts a budget into amounts, and finds how many units of each group reach it: for one level
before units are chosen, and for several levels together.

Promises: a budget of the original network asks for the same amount at every checkpoint, whatever
was cut before; what the schedule's limits cannot reach is said in words before anything is cut.

Each level has fitted its own cut to the whole budget, not knowing of the others. :func:`fitting`
takes whole layers as they are (their five conditions judge them, no budget), and of channels and
heads as many as it takes from there, by the same knapsack over the same removal curves.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elesh.analysis.candidates import Candidates, multiple_of
from elesh.analysis.pruning_set.plans import BudgetUse, Identity, Target, identity_of, restricted
from elesh.analysis.selection.choose import Ranking
from leyline import (
    Budget,
    CheckpointBundle,
    LayerPruningTarget,
    Level,
    PrunedArchitecture,
    PruningGroup,
    RankedUnit,
)

from .knapsack import (
    Curve,
    Fit,
    ResourceModel,
    fit_budget,
    needed,
    price_of_units,
    resource_model,
)


def all_budgets(bundle: CheckpointBundle) -> tuple[Budget, ...]:
    """The budgets that the request has, in its order."""
    asked = bundle.parameters
    return (asked.budget, *asked.more_budgets) if asked.budget is not None else ()


def amount_of(budget: Budget, architecture: PrunedArchitecture, model: ResourceModel) -> float:
    """The whole that the budget is a share of, in the resource's own unit."""
    if budget.of == "present":
        return model.total({})
    if budget.original is not None:
        return budget.original
    return model.total({group.name: -group.removed for group in architecture.groups})


def share_of(budget: Budget, architecture: PrunedArchitecture, amount: float) -> float:
    """``amount`` as a share of what the budget is of."""
    whole = amount_of(budget, architecture, resource_model(architecture, budget))
    return amount / whole if whole else 0.0


def fit_all(
    architecture: PrunedArchitecture,
    budgets: Sequence[Budget],
    curves: Mapping[str, Curve],
    units: int | None = None,
    exact: bool | None = None,
    in_all: int | None = None,
) -> list[Fit]:
    """The cheapest cut that meets all budgets, one after another; the last holds what goes.

    Args:
        units: that may go now.
        in_all: that may go in the rest of the run. Where the cheapest are not enough with so few,
            those go that save enough, at a higher cost: as much as the budget asks for, or at
            least as equal shares of all groups save.
        exact: keep what all of them together do not need; if not given, where one is of the
            original network.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    found: list[Fit] = []
    targets: list[tuple[ResourceModel, float]] = []
    for budget in budgets:
        model = resource_model(architecture, budget)
        target = budget.at_most * amount_of(budget, architecture, model)
        lost = found[-1].lost if found else None
        price = 0.0
        if in_all is not None:
            aim = max(target, _after_equal_shares(model, curves, in_all))
            price = price_of_units(model, curves, aim, in_all, lost)
        found.append(fit_budget(model, curves, target, units=units, already=lost, price=price))
        targets.append((model, target))
    if any(budget.of == "original" for budget in budgets) if exact is None else exact:
        lost = needed(targets, curves, found[-1].lost)
        found[-1] = replace(found[-1], lost=lost, after=targets[-1][0].total(lost))
    return found


def out_of_reach(
    architecture: PrunedArchitecture,
    budgets: Sequence[Budget],
    groups: Sequence[PruningGroup],
    *,
    units: int,
    minimum: int,
    round_to: int = 1,
) -> str:
    """Why the budgets cannot be reached by losing ``units`` more; empty where they can.

    Args:
        groups: that may lose units.
        units: what the last phase's limit leaves to remove, of these groups together.
        minimum: channels that every group keeps; of heads one.
    """
    curves = {}
    for group in groups:
        channels = group.level is Level.CHANNEL
        multiple = multiple_of(group, round_to) if channels else group.unit_multiple
        spare = max(group.size - (minimum if channels else 1), 0)
        curves[group.name] = Curve([1.0] * spare, group.size, multiple)
    for budget in budgets:
        model = resource_model(architecture, budget)
        whole = amount_of(budget, architecture, model)
        fit = fit_budget(model, curves, budget.at_most * whole, units=units)
        if fit.after > budget.at_most * whole * (1 + 1e-9):
            least = fit.after / whole if whole else 0.0
            free = fit_budget(model, curves, budget.at_most * whole)
            why = (
                f"the limit leaves {units} units to remove: raise removed_at_most"
                if free.after < fit.after
                else "groups keep their minimum (min_channels_per_layer is "
                f"{minimum}), or cannot be cut"
            )
            return (
                f"budget {budget.resource} {budget.at_most:g} is out of reach, at best about "
                f"{least:.3g}: {why}"
            )
    orders = itertools.permutations(budgets)
    if len(budgets) < 2 or any(_met_together(architecture, o, curves, units) for o in orders):
        return ""
    asked = " and ".join(f"{budget.resource} {budget.at_most:g}" for budget in budgets)
    return (
        f"budgets {asked} are each within reach, and no way was found to meet all of them by the "
        f"{units} units that the limit leaves to remove: raise removed_at_most"
    )


def _met_together(
    architecture: PrunedArchitecture,
    budgets: Sequence[Budget],
    curves: Mapping[str, Curve],
    units: int,
) -> bool:
    """Whether one cut meets all budgets, where each is fitted on top of those before it."""
    lost = fit_all(architecture, budgets, curves, units, exact=False)[-1].lost
    return all(
        share_of(budget, architecture, resource_model(architecture, budget).total(lost))
        <= budget.at_most * (1 + 1e-9)
        for budget in budgets
    )


def likely_missed(
    architecture: PrunedArchitecture,
    budgets: Sequence[Budget],
    groups: Sequence[PruningGroup],
    *,
    units: int,
    minimum: int,
) -> str:
    """Which budget ``units`` more are too few for where all groups lose alike; empty if none is.

    :func:`out_of_reach` says what no choice of units reaches. What matters to the network decides
    the choice, not what a unit saves, and on the whole that saves no more than equal shares do.
    """
    for budget in budgets:
        model = resource_model(architecture, budget)
        whole = amount_of(budget, architecture, model)
        most = sum(group.size for group in groups)
        left = [model.total(_equal_shares(groups, count, minimum)) for count in (units, most)]
        target = budget.at_most * whole * (1 + 1e-9)
        if left[0] <= target:
            continue
        fewest = bisect_left(
            range(most),
            True,
            key=lambda n: model.total(_equal_shares(groups, n, minimum)) <= target,
        )
        needed = (
            f"some {fewest} would have to go: raise removed_at_most"
            if left[1] <= target
            else f"no more units help: min_channels_per_layer is {minimum}"
        )
        return (
            f"budget {budget.resource} {budget.at_most:g} is unlikely: where groups lose alike, "
            f"the {units} units that the limit leaves bring it to {left[0] / whole:.3g}; {needed}"
        )
    return ""


def _equal_shares(groups: Sequence[PruningGroup], units: int, minimum: int) -> dict[str, int]:
    """So many units, the same share of every group that it can lose."""
    spare = {g.name: max(g.size - (minimum if g.level is Level.CHANNEL else 1), 0) for g in groups}
    return _shares({g.name: (g.size, spare[g.name], g.unit_multiple) for g in groups}, units)


def _shares(groups: Mapping[str, tuple[int, int, int]], units: int) -> dict[str, int]:
    """The same share of every group of (size, units it can lose, multiple)."""
    share = min(units / max(sum(size for size, _, _ in groups.values()), 1), 1.0)
    return {
        name: min(int(share * size), spare) // multiple * multiple
        for name, (size, spare, multiple) in groups.items()
    }


def _after_equal_shares(model: ResourceModel, curves: Mapping[str, Curve], units: int) -> float:
    """What is left where all groups lose the same share, ``units`` together."""
    groups = {name: (c.size, len(c.costs), c.multiple) for name, c in curves.items()}
    return model.total(_shares(groups, units))


def _are_few(
    architecture: PrunedArchitecture,
    budgets: Sequence[Budget],
    candidates: Candidates,
    units: int,
) -> bool:
    """Whether a budget is not met where all groups lose the same share, ``units`` together."""
    sizes = zip(candidates.sizes, candidates.capacities, candidates.multiples, strict=True)
    lost = _shares(dict(zip(candidates.names, sizes, strict=True)), units)
    models = [(budget, resource_model(architecture, budget)) for budget in budgets]
    return any(
        model.total(lost) > budget.at_most * amount_of(budget, architecture, model)
        for budget, model in models
    )


_SPARE = 1.5
"""Units are few where so many times fewer, the same share of all groups, do not meet a budget."""
_REACH = 4
"""Curves are drawn to so many times the quota: expensive units may save much."""


_AT_FIRST = 2.5
"""Times the share of its units that every group loses where all lose alike and meet a budget."""


@dataclass(frozen=True)
class Fitted:
    """A ranking whose groups may lose just what the budget asks of them."""

    ranking: Ranking
    quota: int
    use: BudgetUse
    ignored: tuple[tuple[str, str], ...]
    """Groups whose loss would save nothing."""


def fitted(
    bundle: CheckpointBundle, budgets: Sequence[Budget], ranking: Ranking, quota: int, in_all: int
) -> Fitted:
    """How many units each group loses for the budgets, within ``quota``.

    Args:
        in_all: that the last phase's limit leaves to remove, ``quota`` at least.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    candidates = ranking.candidates
    few = _are_few(bundle.architecture, budgets, candidates, int(in_all / _SPARE))
    if few:  # It matters how much each unit saves: all are looked at.
        depths = dict(zip(candidates.names, candidates.capacities, strict=True))
    else:
        depths = _first_depths(ranking, bundle.architecture, budgets, quota)
    curves = _curves(ranking, depths, sum(candidates.capacities) if few else quota)
    while True:
        fits = fit_all(bundle.architecture, budgets, curves, quota, in_all=in_all if few else None)
        deeper = _deeper(candidates, depths, fits[-1].lost)
        again = {name: depth for name, depth in deeper.items() if depth != depths[name]}
        if not again:
            break
        # Where curves are not drawn whole, groups know nothing of each other.
        drawn = _curves(ranking, again, quota)
        curves |= {name: drawn[name] for name in again}
        depths = deeper
    fit, budget, idle = (
        fits[-1],
        budgets[0],
        set(fits[0].idle).intersection(*(f.idle for f in fits)),
    )
    model = resource_model(bundle.architecture, budget)
    left = share_of(budget, bundle.architecture, model.total(fit.lost))
    return Fitted(
        ranking=replace(ranking, candidates=candidates.limited(fit.lost)),
        quota=sum(fit.lost.values()),
        use=BudgetUse(budget.resource, left, budget.at_most, budget.of),
        ignored=tuple((name, f"losing units saves no {budget.resource}") for name in sorted(idle)),
    )


def _first_depths(
    ranking: Ranking, architecture: PrunedArchitecture, budgets: Sequence[Budget], quota: int
) -> dict[str, int]:
    """How far the curve of each group is drawn at first.

    Whole, but where each group has an order of its own of which every step takes long
    (``reconstruction``), all units may go, and what is saved grows with every one (not latency,
    which falls in stairs).
    """
    candidates = ranking.candidates
    whole = dict(zip(candidates.names, candidates.capacities, strict=True))
    stairs = any(budget.resource == "latency" for budget in budgets)
    if ranking.scorer != "reconstruction" or stairs or _REACH * quota < sum(whole.values()):
        return whole
    least = min(_of_present(budget, architecture) for budget in budgets)
    share = _AT_FIRST * (1 - math.sqrt(least))
    sizes = dict(zip(candidates.names, candidates.sizes, strict=True))
    return {name: min(most, math.ceil(share * sizes[name]) + 1) for name, most in whole.items()}


def _of_present(budget: Budget, architecture: PrunedArchitecture) -> float:
    """What the budget leaves of the network as it is, at most all of it."""
    model = resource_model(architecture, budget)
    now = model.total({})
    asked = budget.at_most * amount_of(budget, architecture, model)
    return min(1.0, asked / now) if now > 0 else 1.0


def _deeper(
    candidates: Candidates, depths: Mapping[str, int], lost: Mapping[str, int]
) -> dict[str, int]:
    """The depths, doubled where a group loses so much of what was drawn that it might lose more:
    what is not reached on half of a curve is not changed by what lies behind it."""
    return {
        name: min(most, 2 * depths[name]) if 2 * lost.get(name, 0) > depths[name] else depths[name]
        for name, most in zip(candidates.names, candidates.capacities, strict=True)
    }


def _curves(ranking: Ranking, depths: Mapping[str, int], quota: int) -> dict[str, Curve]:
    """What the cheapest units of each group cost, one after another."""
    candidates = ranking.candidates
    limited = replace(ranking, candidates=candidates.limited(depths))
    most = min(sum(limited.candidates.capacities), _REACH * quota)
    drawn = limited.choose(most, capable=True)
    costs: list[list[float]] = [[] for _ in candidates.names]
    for unit, marginal_cost in drawn.marginal_costs.items():
        costs[int(candidates.group_of[unit])].append(marginal_cost)
    parts = zip(candidates.names, costs, candidates.sizes, candidates.multiples, strict=True)
    return {name: Curve(own, size, multiple) for name, own, size, multiple in parts}


@dataclass(frozen=True)
class Fitting:
    """The cut that a budget needs."""

    targets: tuple[Target, ...]
    order: tuple[RankedUnit, ...]
    use: BudgetUse | None = None
    """None without a budget."""
    unneeded: frozenset[Identity] = frozenset()
    """Units that the budget is met without."""


def fitting(
    bundle: CheckpointBundle,
    targets: Sequence[Target],
    order: Sequence[RankedUnit],
    *,
    round_to: int,
    comparable: bool,
) -> Fitting:
    """The part of a cut that meets the budget, or all of it; only if the request has a budget.

    Args:
        targets, order: of all levels, each group's units in the order of their removal.
        round_to: of channels.
        comparable: whether the costs of all levels are of one kind; else a unit
            costs its place in the order.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    budgets, architecture = all_budgets(bundle), bundle.architecture
    layers = [t.layer_name for t in targets if isinstance(t, LayerPruningTarget)]
    left = architecture.without_layers(layers) if layers else architecture
    curves = _curves_of(left, order, round_to, comparable)
    wholes = [
        amount_of(budget, architecture, resource_model(architecture, budget)) for budget in budgets
    ]
    fixed = [
        _of_what_is_left(budget, left).model_copy(update={"of": "original", "original": whole})
        for budget, whole in zip(budgets, wholes, strict=True)
    ]
    exact = budgets[0].of == "original"
    fit = fit_all(left, fixed, curves, exact=exact)[-1]
    model, whole = resource_model(left, fixed[0]), wholes[0]
    kept = _first(order, fit.lost)
    lost = frozenset(map(identity_of, order)) - frozenset(map(identity_of, kept))
    share = model.total(fit.lost) / whole if whole else 0.0
    use = BudgetUse(budgets[0].resource, share, budgets[0].at_most, budgets[0].of)
    return Fitting(restricted(targets, order, kept, "budget"), kept, use, lost)


def _curves_of(
    architecture: PrunedArchitecture, order: Sequence[RankedUnit], round_to: int, comparable: bool
) -> dict[str, Curve]:
    costs: dict[str, list[float]] = {}
    for place, unit in enumerate(order):
        if unit.level is not Level.LAYER:
            costs.setdefault(unit.layer_name, []).append(unit.cost if comparable else place + 1.0)
    curves = {}
    for name, own in costs.items():
        group = architecture.group[name]
        multiple = multiple_of(group, round_to if group.level is Level.CHANNEL else 1)
        curves[name] = Curve(own, group.size, multiple)
    return curves


def _of_what_is_left(budget: Budget, left: PrunedArchitecture) -> Budget:
    """The budget with the latencies of the layers that are left."""
    table = budget.latency
    if table is None:
        return budget
    weights = {layer.name: layer.weight for layer in left.layers}
    rows = tuple(
        row
        for row in table.layers
        if (weights.get(row.layer) or f"{row.layer}.weight") in left.tensor
    )
    gone = sum(max(row.seconds) for row in table.layers if row not in rows)
    total = max(0.0, table.total_seconds - gone)
    shorter = table.model_copy(update={"layers": rows, "total_seconds": total})
    return budget.model_copy(update={"latency": shorter})


def _first(order: Sequence[RankedUnit], lost: Mapping[str, int]) -> tuple[RankedUnit, ...]:
    """Of each group the first units, as many as it loses; and all layers."""
    capacity, kept = dict(lost), []
    for unit in order:
        if unit.level is Level.LAYER:
            kept.append(unit)
        elif capacity.get(unit.layer_name, 0):
            capacity[unit.layer_name] -= 1
            kept.append(unit)
    return tuple(kept)
