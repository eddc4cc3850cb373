"""One budget for several levels: what of their cuts together it needs.

Each level has fitted its own cut to the whole budget, not knowing of the others. Here whole layers
are taken as they are (their five conditions judge them, no budget), and of channels and heads as
many as it takes from there, by the same knapsack over the same removal curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elesh.analysis.candidates import multiple_of
from elesh.analysis.pruning_set.plans import BudgetUse, Target
from elesh.analysis.pruning_set.subsets import Identity, identity_of, restricted
from leyline import (
    Budget,
    CheckpointBundle,
    LayerPruningTarget,
    Level,
    PrunedArchitecture,
    RankedUnit,
)

from .knapsack import Curve
from .resources import resource_model
from .targets import all_budgets, amount_of, fit_all

__all__ = ["Fitting", "fitting"]


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
    """The part of a cut that brings the budget's resource down to what is asked, or all of it.

    Args:
        targets, order: of all levels, each group's units in the order of their removal.
        round_to: of channels.
        comparable: whether the costs of all levels are of one kind; else a unit
            costs its place in the order.

    Raises:
        InvalidField: if a latency table is not of this architecture.
    """
    budgets, architecture = all_budgets(bundle), bundle.architecture
    if not budgets:
        return Fitting(tuple(targets), tuple(order))
    layers = [t.layer_name for t in targets if isinstance(t, LayerPruningTarget)]
    left = architecture.without_layers(layers) if layers else architecture
    curves = _curves(left, order, round_to, comparable)
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


def _curves(
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
