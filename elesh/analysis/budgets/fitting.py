"""Fitting a level's candidates to a budget of a resource, before units are chosen among them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from elesh.analysis.pruning_set.plans import BudgetUse
from elesh.analysis.selection.choose import Ranking
from leyline import Budget, CheckpointBundle, InvalidField

from .knapsack import Curve
from .resources import resource_model
from .targets import fit_all, share_of

__all__ = ["Fitted", "fitted", "refuse_shard"]

_REACH = 4
"""Curves are drawn to so many times the quota: expensive units may save much."""


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
    drawn = ranking.choose(min(sum(candidates.capacities), _REACH * quota))
    costs: list[list[float]] = [[] for _ in candidates.names]
    for unit, marginal_cost in drawn.marginal_costs.items():
        costs[int(candidates.group_of[unit])].append(marginal_cost)
    parts = zip(candidates.names, costs, candidates.sizes, candidates.multiples, strict=True)
    curves = {name: Curve(own, size, multiple) for name, own, size, multiple in parts}
    fits = fit_all(bundle.architecture, budgets, curves, quota)
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


def refuse_shard(bundle: CheckpointBundle, shard: Collection[str] | None) -> None:
    """Raise an InvalidField for a shard of a level that has a budget to fit."""
    if shard is not None and bundle.parameters.budget is not None:
        raise InvalidField("shard", "none with a budget: it is fitted over all groups", len(shard))
