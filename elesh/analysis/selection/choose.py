"""Chooses units of any level: redundant ones first, then the cheapest; units within the noise stay.
Predicts the effect of removing them.

Promises: with output projections units are chosen jointly and judged on samples that did not choose
them; without, by fixed scores. At most ``quota`` units go, no group falls below its minimum, every
group that loses anything ends at its multiple, and the unit that a redundant one was removed in
favour of stays.

A unit goes only if what it costs alone, two standard errors included, is less than what a unit
taken at random would cost alone. Where all units of a network look alike, or the samples are too
few to tell them apart, nothing is chosen by its looks. This is the rule of the whole cut (the
``noise`` gate) for each of its units. What units make up for in each other does not count here: on
the samples that chose them, part of it is chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from elesh.analysis.candidates import Bools, Candidates, Doubles, Floats, Ints
from elesh.analysis.importance.scores import (
    Pair,
    Prediction,
    Projections,
    output_mean_square,
    predict,
)
from elesh.analysis.spans import span
from leyline import CheckpointBundle, GateStatistics, Level, SparedGroup, SparedUnit
from leyline.messages.parameters import Scorer

from .reconstruction_order import ReconstructionOrder
from .removal_order import (
    SHRINKAGE,
    JointOrder,
    Order,
    RemovalOrder,
    StaticOrder,
    cheapest_first,
    rounded,
)

__all__ = [
    "Bars",
    "Choice",
    "Decide",
    "MAX_NEAR_CUT",
    "Ranking",
    "Reason",
    "Scorer",
    "Selection",
    "error_bars",
    "fisher_fault",
    "gates_of",
    "groups_near_cut",
    "kept_near_cut",
    "marginal_cost_errors",
    "pairs_by_group",
    "projection_fault",
    "rounded_to_multiples",
    "select",
    "usable_projections",
    "without_noise",
]


@dataclass(frozen=True)
class Selection:
    """What :func:`select` chose; units are places in the candidates' row."""

    order: Order
    """The removal order at its end: its costs are those of the units that stayed."""
    removal_order: RemovalOrder
    """The units that go, as they were taken."""
    pairs: tuple[Pair, ...] = ()
    """Redundant units that went, each with the one that was kept for it."""
    kept: frozenset[int] = frozenset()
    """Units that stayed because redundant ones went in their favour."""
    too_expensive: frozenset[int] = frozenset()
    """Redundant units that cost more than any that the plain order takes."""
    kept_for_multiple: frozenset[int] = frozenset()
    """Units that stay so that a group ends at its multiple."""
    noise: frozenset[int] = frozenset()
    """Units that stay because they lie inside the noise (:func:`without_noise`)."""

    @cached_property
    def units(self) -> tuple[int, ...]:
        """The units that go, rising."""
        return tuple(np.sort(self.removal_order.units).tolist())

    @cached_property
    def marginal_costs(self) -> dict[int, float]:
        """What each unit cost when it was taken, in that order."""
        return dict(
            zip(
                self.removal_order.units.tolist(),
                self.removal_order.marginal_costs.tolist(),
                strict=True,
            )
        )


def select(
    make_order: Callable[[], Order], quota: int, redundant: Sequence[Pair] = ()
) -> Selection:
    """Choose up to ``quota`` units.

    Redundant units are considered first. Where costs are joint, a redundant unit goes only while
    it costs at most what the plain order would pay for its most expensive unit within the quota:
    likeness of activations says nothing about what a unit does to the output. Then the cheapest
    units follow, without those in whose favour a redundant one went.

    Args:
        make_order: a fresh order; called twice where redundant units have joint costs.
        redundant: pairs (kept, removed) of places, every unit removed at most once and never both.
    """
    order, removal_order, too_expensive = make_order(), RemovalOrder(), frozenset[int]()
    among = np.ones(order.candidates.count, dtype=np.bool_)
    if redundant:
        order, removal_order, too_expensive = _redundant_first(order, make_order, quota, redundant)
        gone = frozenset(removal_order.units.tolist())
        among[[pair.kept for pair in redundant if pair.removed in gone]] = False
    removal_order = removal_order.then(order.pick(quota - len(removal_order.units), among))
    removal_order, kept_for_multiple = rounded_to_multiples(order, removal_order, quota, among)
    if not (redundant or kept_for_multiple):
        return Selection(order, removal_order)
    final = frozenset(removal_order.units.tolist())
    pairs = tuple(p for p in redundant if p.removed in final and p.kept not in final)
    return Selection(
        order,
        removal_order,
        pairs=pairs,
        kept=frozenset(pair.kept for pair in pairs),
        too_expensive=too_expensive - final,
        kept_for_multiple=kept_for_multiple - final,
    )


def _redundant_first(
    order: Order, make_order: Callable[[], Order], quota: int, redundant: Sequence[Pair]
) -> tuple[Order, RemovalOrder, frozenset[int]]:
    """The order after the redundant units, which of them went, and which were too expensive."""
    removed, ceiling = np.zeros(order.candidates.count, dtype=np.bool_), math.inf
    removed[[pair.removed for pair in redundant]] = True
    if isinstance(order, JointOrder):
        ceiling = order.pick(quota, np.ones_like(removed)).max_cost
        order = make_order()
    removal_order = order.pick(quota, removed, ceiling)
    too_expensive = np.flatnonzero(order.free(removed) & (order.costs > ceiling))
    return order, removal_order, frozenset(too_expensive.tolist())


def rounded_to_multiples(
    order: Order, removal_order: RemovalOrder, quota: int, among: Bools
) -> tuple[RemovalOrder, frozenset[int]]:
    """Keep what breaks a multiple, then spend what is left of the quota on whole blocks.

    Args:
        order: has taken these units.

    Returns:
        the units that go in the end, and those that stay for a multiple.
    """
    candidates = order.candidates
    if max(candidates.multiples, default=1) == 1:
        return removal_order, frozenset()
    by_group: dict[int, list[int]] = {}
    for unit in removal_order.units.tolist():
        by_group.setdefault(int(candidates.group_of[unit]), []).append(unit)
    back: list[int] = []
    for group, units in by_group.items():
        kept = _present(order, group)
        excess = -kept % candidates.multiples[group]
        # A group that is no multiple to begin with may not reach the one above: leave it whole.
        count = excess if kept + excess <= candidates.sizes[group] else len(units)
        back += units[len(units) - count :]
    order.put_back(back)
    removal_order = removal_order.without(back)
    while len((block := _cheapest_block(order, quota - len(removal_order.units), among)).units):
        removal_order = removal_order.then(block)
        order.take(block.units)
    return removal_order, frozenset(back)


def _cheapest_block(order: Order, left: int, among: Bools) -> RemovalOrder:
    """The units that bring one group to its next multiple at the lowest cost a unit."""
    candidates, best, best_mean = order.candidates, RemovalOrder(), math.inf
    free = order.free(among)
    for group, multiple in enumerate(candidates.multiples):
        span = candidates.span(group)
        size = _present(order, group) % multiple or multiple
        units = np.flatnonzero(free[span]) + span.start
        if size > min(left, int(order.capacity[group]), len(units)):
            continue
        units = units[cheapest_first(order.costs[units], size)]
        mean = float(rounded(np.array([order.costs[units].mean()]))[0])
        if mean < best_mean:
            best_mean = mean
            best = RemovalOrder(units, order.costs[units])
    return best


def _present(order: Order, group: int) -> int:
    return int(np.count_nonzero(~order.taken[order.candidates.span(group)]))


_BLOCK = 1024
"""Units whose samples are looked at together."""


@dataclass(frozen=True)
class Bars:
    """What units cost one after the other, in squared output units (scaled as the columns)."""

    costs: Doubles
    """[K]: by how much each raises the mean square of the movement."""
    errors: Doubles
    """[K]: standard errors, from the scatter of the samples, or half the difference between the
    two halves of the samples, whichever is larger."""


def error_bars(
    columns: Floats, units: Sequence[int], *, alone: bool = False, shrinkage: float = SHRINKAGE
) -> Bars:
    """The costs of ``units`` in this order, or of each alone, with their error bars.

    Args:
        columns: [C, N], the even samples first (see :class:`Projections`).
        units: places in the row of candidates.
        shrinkage: how much of the cross terms counts, as in :class:`JointOrder`.
    """
    samples = columns.shape[1]
    middle, moved = (samples + 1) // 2, np.zeros(samples)
    costs, errors = np.empty(len(units)), np.empty(len(units))
    for start in range(0, len(units), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(units)))
        taken = columns[list(units[part])].astype(np.float64)
        before = moved + np.cumsum(taken, axis=0) - taken
        values = taken * taken if alone else taken * (taken + 2 * shrinkage * before)
        moved = before[-1] + taken[-1]
        costs[part] = values.mean(axis=1)
        scatter = values.std(axis=1) / math.sqrt(samples)
        difference = values[:, :middle].mean(axis=1) - values[:, middle:].mean(axis=1)
        errors[part] = np.maximum(scatter, np.abs(difference) / 2)
    return Bars(costs, errors)


def marginal_cost_errors(selection: Selection, columns: Floats) -> dict[int, float]:
    """The standard errors of what the units cost when they were taken."""
    units = selection.removal_order.units.tolist()
    return dict(zip(units, error_bars(columns, units).errors.tolist(), strict=True))


def without_noise(selection: Selection, columns: Floats) -> Selection:
    """The selection without the units inside the noise.

    Groups that would no longer end at their multiple keep the units they lost last, too. No other
    unit goes instead: whatever would follow costs more still.
    """
    units = selection.removal_order.units
    bars = error_bars(columns, units.tolist(), alone=True)
    candidates = selection.order.candidates
    limit = _typical(columns, candidates)
    noisy = (bars.costs + 2 * bars.errors >= limit) & (limit > 0)
    if not noisy.any():
        return selection
    quiet = units[~noisy]
    back = _beyond_multiples(candidates, quiet)
    gone = set(units[noisy].tolist()) | back
    selection.order.put_back(sorted(gone))
    pairs = tuple(pair for pair in selection.pairs if pair.removed not in gone)
    return replace(
        selection,
        removal_order=selection.removal_order.without(gone),
        pairs=pairs,
        kept=frozenset(pair.kept for pair in pairs),
        kept_for_multiple=selection.kept_for_multiple | back,
        noise=frozenset(units[noisy].tolist()),
    )


def _typical(columns: Floats, candidates: Candidates) -> float:
    """What a unit taken at random from the groups that may lose any would cost alone."""
    capacities = np.array(candidates.capacities)[candidates.group_of] > 0
    squares = np.einsum("ij,ij->i", columns, columns, dtype=np.float64)[capacities]
    return float(squares.mean()) / columns.shape[1] if len(squares) else 0.0


def _beyond_multiples(candidates: Candidates, units: Ints) -> set[int]:
    """The units, last ones first, that keep their groups from ending at their multiples."""
    if max(candidates.multiples, default=1) == 1:
        return set()
    back: set[int] = set()
    groups = candidates.group_of[units]
    for group in np.unique(groups).tolist():
        taken = units[groups == group].tolist()
        excess = -(candidates.sizes[group] - len(taken)) % candidates.multiples[group]
        back |= set(taken[len(taken) - excess :] if excess <= len(taken) else taken)
    return back


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

    @span("select")
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
            # Residuals' movement; its error is that of a mean of as many squares of normal draws as
            # there are samples.
            moved = float(sum(selection.marginal_costs.values()))
            samples = len(next(iter(bundle.gates.values())).projections)
            prediction = Prediction(moved, moved * math.sqrt(2 / samples), None)
            mean_square = output_mean_square(bundle.gates.values())
            return Choice(selection, quota, 1.0, prediction, mean_square)

        folds: list[Selection] = []

        def on_samples(columns: Floats) -> Sequence[int]:
            folds.append(self.choose(count, columns) if joint else selection)
            return folds[-1].units

        prediction = predict(projections, self.candidates, count, on_samples)
        mean_square = output_mean_square(bundle.gates.values(), projections.weights)
        return Choice(selection, quota, scale, prediction, mean_square, tuple(folds), errors)


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


def pairs_by_group(candidates: Candidates, pairs: Iterable[Pair]) -> dict[int, list[Pair]]:
    """Redundant pairs by the number of their group, in its own numbering."""
    found: dict[int, list[Pair]] = {}
    for pair in pairs:
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
    close = order.costs[stayed] <= _NEAR * max(selection.removal_order.max_cost, 0.0)
    near = stayed[close | np.isin(stayed, list(selection.noise))]
    near = near[np.argsort(order.costs[near], kind="stable")][:MAX_NEAR_CUT]
    left = choice.quota - len(selection.units)
    usual: Reason = "quota"
    if order.capacity[group] == 0:
        usual = "minimum"
    elif 0 < left < candidates.multiples[group]:
        usual = "rounding"
    reasons: dict[Reason, frozenset[int]] = {
        "noise": selection.noise,
        "representative": selection.kept,
        "rounding": selection.kept_for_multiple,
        "redundancy_cost": selection.too_expensive,
    }
    return tuple(
        SparedUnit(
            index=unit - span.start,
            cost=float(order.costs[unit]) * choice.scale,
            reason=next((why for why, units in reasons.items() if unit in units), usual),
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
