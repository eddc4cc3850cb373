"""Choosing units of any level, and predicting what their removal does.

Promises: with output projections units are chosen jointly and judged on samples that did not
choose them; without, by fixed scores; nothing goes against minimum, multiple or quota.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from elesh.analysis.candidates import Candidates, Doubles, Floats
from elesh.analysis.importance.output_projections import (
    Prediction,
    Projections,
    output_mean_square,
    predict,
)
from elesh.analysis.importance.redundancy import Pair
from elesh.analysis.spans import stage
from leyline import CheckpointBundle, GateStatistics, Level, SparedGroup, SparedUnit
from leyline.messages.parameters import Scorer

from .noise import marginal_cost_errors, without_noise
from .reconstruction_order import ReconstructionOrder
from .removal_order import JointOrder, Order, StaticOrder
from .select import Selection, select

__all__ = [
    "MAX_NEAR_CUT",
    "Choice",
    "Decide",
    "Ranking",
    "Reason",
    "Scorer",
    "fisher_fault",
    "gates_of",
    "pairs_by_group",
    "projection_fault",
    "groups_near_cut",
    "kept_near_cut",
    "usable_projections",
]

Reason = Literal[
    "representative",
    "rounding",
    "redundancy_cost",
    "minimum",
    "quota",
    "budget",
    "noise",
    "coupling",
    "verification",
    "rolled_back",
    "limit",
]
MAX_NEAR_CUT = 16
_NEAR = 2.0
"""A unit is near the cut if it costs at most so many times the most expensive that goes."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it is predicted to do."""

    selection: Selection
    quota: int
    """So many units might have been chosen."""
    scale: float
    """Costs times this are in their own unit."""
    prediction: Prediction | None
    """Where output projections of all candidates are there."""
    output_mean_square: float
    """Estimated from the same projections."""
    folds: tuple[Selection, ...] = ()
    """What each fold of the samples alone would choose, where costs are joint."""
    errors: Mapping[int, float] = field(default_factory=dict)
    """Standard errors of the costs, where costs are joint."""
    scorer: Scorer | None = None
    """By what it was chosen, if not as the ranking says."""

    def errors_of(self, units: Sequence[int]) -> tuple[float, ...]:
        """The standard errors of these places' costs, in their own unit; none if not known."""
        return tuple(self.errors[unit] * self.scale for unit in units) if self.errors else ()


@dataclass(frozen=True)
class Ranking:
    """The candidates of some groups with everything that a selection looks at."""

    candidates: Candidates
    scorer: Scorer
    projections: Projections | None
    """Of all candidates, where there are any that can be used."""
    scores: Doubles
    """[C] the fixed scores; with ``output_projection`` costs are joint instead."""
    redundant: Sequence[Pair]
    """Pairs that are considered first."""
    threads: int = 1
    gates: Mapping[str, GateStatistics] = field(default_factory=dict)
    """By group, with input moments, for ``reconstruction``."""

    def choose(
        self,
        quota: int,
        columns: Floats | None = None,
        moved: Doubles | None = None,
        *,
        capable: bool = False,
    ) -> Selection:
        """Up to ``quota`` units.

        Args:
            columns: some samples of the projections; all of them if not given.
            moved: r at the start, in the order and scale of the columns.
            capable: what stays in groups that may lose nothing need not have costs.
        """
        if columns is None and self.projections is not None:
            columns = self.projections.columns

        def make_order() -> Order:
            if self.scorer == "reconstruction":
                return ReconstructionOrder(self.candidates, self.gates, capable=capable)
            if columns is None or self.scorer != "output_projection":
                return StaticOrder(self.candidates, self.scores)
            return JointOrder(self.candidates, columns, moved=moved, threads=self.threads)

        return select(make_order, quota, self.redundant)

    @stage("select")
    def decide(self, bundle: CheckpointBundle, quota: int) -> Choice:
        """Choose up to ``quota`` units and predict what removing them does.

        Where the checkpoint says that cuts are followed by reconstruction, that is the movement
        after it: the costs of the order are of what the kept units cannot make up for.
        """
        selection, projections = self.choose(quota), self.projections
        joint, errors = self.scorer == "output_projection", dict[int, float]()
        if projections and joint and selection.units:
            selection = without_noise(selection, projections.columns)
            errors = marginal_cost_errors(selection, projections.columns)
        count = len(selection.units)
        scale = projections.unit**2 if projections and joint else 1.0
        if projections is None or not selection.units:
            return Choice(selection, quota, scale, None, 0.0)
        if self.scorer == "reconstruction" and bundle.parameters.reconstruction is not None:
            return self._after_reconstruction(bundle, selection, quota)

        folds: list[Selection] = []

        def on_samples(columns: Floats) -> Sequence[int]:
            folds.append(self.choose(count, columns) if joint else selection)
            return folds[-1].units

        prediction = predict(projections, self.candidates, count, on_samples)
        mean_square = output_mean_square(bundle.gates.values(), projections.weights)
        return Choice(selection, quota, scale, prediction, mean_square, tuple(folds), errors)

    def _after_reconstruction(
        self, bundle: CheckpointBundle, selection: Selection, quota: int
    ) -> Choice:
        """The choice with the residuals' movement as its prediction; its error is that of a mean
        of as many squares of normal draws as there are samples."""
        moved = float(sum(selection.marginal_costs.values()))
        samples = len(next(iter(bundle.gates.values())).projections)
        prediction = Prediction(moved, moved * math.sqrt(2 / samples), None)
        return Choice(selection, quota, 1.0, prediction, output_mean_square(bundle.gates.values()))


Decide = Callable[[Ranking, CheckpointBundle, int], Choice]
"""From a ranking, its checkpoint and a quota to what goes; :meth:`Ranking.decide` is one."""


def gates_of(bundle: CheckpointBundle, level: Level) -> dict[str, GateStatistics]:
    """The gate statistics of a level, by group."""
    groups = bundle.architecture.group
    return {name: gate for name, gate in bundle.gates.items() if groups[name].level is level}


def projection_fault(bundle: CheckpointBundle) -> str:
    """Why output projections cannot be used; empty where they can."""
    projections = [gate.projections for gate in bundle.gates.values()]
    if not projections:
        return "no gate statistics"
    if len(projections[0]) < 2:
        return "gate statistics of fewer than two samples"
    return "" if any(g.any() for g in projections) else "all output projections are zero"


def fisher_fault(bundle: CheckpointBundle, level: Level) -> str:
    """Why units of a level cannot be ranked by Fisher information; empty where they can."""
    groups = bundle.architecture.groups
    names = [group.name for group in groups if group.level is level and group.prunable]
    found = [bundle.gates[name].second_order for name in names if name in bundle.gates]
    if not found:
        return "no gate statistics"
    return "" if any(row.any() for row in found) else "all squared gate gradients are zero"


def usable_projections(bundle: CheckpointBundle, candidates: Candidates) -> Projections | None:
    """Projections of all candidates, where every one has some that can be used."""
    if projection_fault(bundle) or not all(name in bundle.gates for name in candidates.names):
        return None
    level = bundle.architecture.group[candidates.names[0]].level
    return Projections.of(gates_of(bundle, level), candidates)


def pairs_by_group(candidates: Candidates, selection: Selection) -> dict[int, list[Pair]]:
    """Redundant pairs of the selection by the number of their group, in its own numbering."""
    found: dict[int, list[Pair]] = {}
    for pair in selection.pairs:
        group = int(candidates.group_of[pair.removed])
        start = int(candidates.starts[group])
        own = Pair(pair.kept - start, pair.removed - start, pair.similarity)
        found.setdefault(group, []).append(own)
    return found


def kept_near_cut(candidates: Candidates, choice: Choice, group: int) -> tuple[SparedUnit, ...]:
    """The cheapest units of the group that stayed although they were near the cut, with reasons."""
    selection = choice.selection
    order, span = selection.order, candidates.span(group)
    stayed = np.flatnonzero(~order.taken[span]) + span.start
    close = order.costs[stayed] <= _NEAR * max(selection.max_cost, 0.0)
    near = stayed[close | np.isin(stayed, list(selection.noise))]
    near = near[np.argsort(order.costs[near], kind="stable")][:MAX_NEAR_CUT]
    left = choice.quota - len(selection.units)
    usual: Reason = "quota"
    if order.capacity[group] == 0:
        usual = "minimum"
    elif 0 < left < candidates.multiples[group]:
        usual = "rounding"
    return tuple(
        SparedUnit(
            index=unit - span.start,
            cost=float(order.costs[unit]) * choice.scale,
            reason=_reason(selection, unit, usual),
        )
        for unit in sorted(near.tolist())
    )


def groups_near_cut(candidates: Candidates, choice: Choice) -> tuple[SparedGroup, ...]:
    """The groups that lose nothing although some of their units were near the cut."""
    losing = set(candidates.group_of[list(choice.selection.units)].tolist())
    found = (
        (name, kept_near_cut(candidates, choice, group))
        for group, name in enumerate(candidates.names)
        if group not in losing
    )
    return tuple(SparedGroup(layer_name=name, spared=units) for name, units in found if units)


def _reason(selection: Selection, unit: int, usual: Reason) -> Reason:
    if unit in selection.noise:
        return "noise"
    if unit in selection.kept:
        return "representative"
    if unit in selection.kept_for_multiple:
        return "rounding"
    if unit in selection.too_expensive:
        return "redundancy_cost"
    return usual
