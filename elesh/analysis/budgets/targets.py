"""What a budget means in amounts: of the present network or of the original one, and how far to go.

Promises: a budget of the original network asks for the same amount at every checkpoint, whatever
was cut before; what the schedule's limits cannot reach is said in words before anything is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elesh.analysis.candidates import multiple_of
from leyline import Budget, CheckpointBundle, Level, PrunedArchitecture, PruningGroup

from .knapsack import Curve, Fit, fit_budget
from .resources import ResourceModel, resource_model

__all__ = ["all_budgets", "amount_of", "fit_all", "out_of_reach", "share_of"]


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
) -> list[Fit]:
    """The cheapest cut that meets all budgets, one after another; the last holds what goes.

    Args:
        exact: keep what need not go; if not given, for budgets of the original network.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    found: list[Fit] = []
    for budget in budgets:
        model = resource_model(architecture, budget)
        target = budget.at_most * amount_of(budget, architecture, model)
        found.append(
            fit_budget(
                model,
                curves,
                target,
                units=units,
                already=found[-1].lost if found else None,
                exact=budget.of == "original" if exact is None else exact,
            )
        )
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
                else "groups keep their minimum, or cannot be cut"
            )
            return (
                f"budget {budget.resource} {budget.at_most:g} is out of reach, at best about "
                f"{least:.3g}: {why}"
            )
    return ""
