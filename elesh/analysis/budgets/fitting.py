"""Fitting a level's candidates to a budget of a resource, before units are chosen among them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from elesh.analysis.candidates import Candidates
from elesh.analysis.pruning_set.plans import BudgetUse
from elesh.analysis.selection.choose import Ranking
from leyline import Budget, CheckpointBundle, InvalidField, PrunedArchitecture

from .knapsack import Curve
from .resources import resource_model
from .targets import amount_of, fit_all, share_of

__all__ = ["Fitted", "fitted", "refuse_shard"]

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
    bundle: CheckpointBundle, budgets: Sequence[Budget], ranking: Ranking, quota: int
) -> Fitted:
    """How many units each group loses for the budgets, within ``quota``.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    candidates = ranking.candidates
    depths = _first_depths(ranking, bundle.architecture, budgets, quota)
    curves = _curves(ranking, depths, quota)
    while True:
        fits = fit_all(bundle.architecture, budgets, curves, quota)
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


def refuse_shard(bundle: CheckpointBundle, shard: Collection[str] | None) -> None:
    """Raise an InvalidField for a shard of a level that has a budget to fit."""
    if shard is not None and bundle.parameters.budget is not None:
        raise InvalidField("shard", "none with a budget: it is fitted over all groups", len(shard))
