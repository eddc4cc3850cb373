"""From a prepared plan to the units it removes: the steps that channels and heads share.

Promises: a plan that has nothing to choose among, or no quota, comes back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from elesh.analysis.budgets.fitting import fitted
from elesh.analysis.budgets.targets import all_budgets
from elesh.analysis.pruning_set.plans import LevelPlan, Target, with_choice
from elesh.analysis.selection.choose import Choice, Decide, Ranking
from leyline import CheckpointBundle

__all__ = ["planned"]


def planned(
    bundle: CheckpointBundle,
    plan: LevelPlan,
    rank: Callable[[], Ranking],
    decide: Decide,
    targets: Callable[[Ranking, Choice], Sequence[Target]],
) -> LevelPlan:
    """The plan with its units chosen and what removing them is predicted to do.

    Args:
        plan: prepared: which groups may lose units, by which score, and how many. Where the
            request has a budget, the cut is fitted to it within that number.
        rank: the ranking of the plan's groups; called once, where there is something to choose.
        decide: what chooses, once everything is ranked.
        targets: what the choice means for each group that loses units.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    if not plan.groups or not plan.allowed.quota:
        return plan
    ranking, quota, budgets = rank(), plan.allowed.quota, all_budgets(bundle)
    if budgets:
        fit = fitted(bundle, budgets, ranking, quota)
        ranking, quota = fit.ranking, fit.quota
        plan = replace(plan, budget=fit.use, ignored=plan.ignored + fit.ignored)
        if fit.use.of == "original" and not quota and fit.use.left <= fit.use.at_most:
            left = f"{fit.use.left:.4g} of the original {fit.use.resource} are left"
            return replace(plan, nothing=f"nothing to remove: the budget is reached, {left}")
    choice = decide(ranking, bundle, quota)
    return with_choice(plan, bundle, ranking.candidates, choice, targets(ranking, choice))
