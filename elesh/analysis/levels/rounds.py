"""Choosing in rounds: mask a part, measure the remaining units on the masked network, repeat.

Promises: what is chosen keeps to the plan's quota, minimums and multiples and goes through the same
gates as a choice made at once; where rounds cannot be made, the choice made at once stays and the
decision says why. The same measurements give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elesh.analysis.candidates import Bools, Candidates
from elesh.analysis.importance.scores import output_mean_square, predict
from elesh.analysis.selection.choose import Choice, Ranking, Selection, rounded_to_multiples
from elesh.analysis.selection.removal_order import LogitGapOrder, Order, RemovalOrder, StaticOrder
from elesh.analysis.spans import span
from elesh.safety import BreakerStatus, Entry, LogitGaps, Remeasuring, breaker_gate, rejection
from elesh.settings import Settings
from leyline import CheckpointBundle, Fallback, Level

from .analyze_level import UNIT_LEVELS, LevelDraft, judged

REFUSED = "rounds_refused"
"""The fallback of the failure table: what rounds chose does not pass the gates, or is nothing."""
_FORETOLD = frozenset({"predicted_shift", "noise"})
"""Gates that another choice of as many units may pass."""


@dataclass(frozen=True)
class Rounds:
    """A level, and in how many rounds it was chosen; 1: at once, from the statistics."""

    level: LevelDraft
    count: int = 1


@span("rounds")
def in_rounds(
    bundle: CheckpointBundle,
    settings: Settings,
    levels: Sequence[LevelDraft],
    network: Remeasuring,
    breakers: Mapping[Level, BreakerStatus],
    groups: Mapping[Level, Collection[str]],
) -> list[Rounds]:
    """The levels, with the units of those that propose enough to be worth it chosen in rounds.

    Either all of these are, or, where the network cannot be measured again, none.

    Args:
        network: of the checkpoint.
        breakers: of the levels; nothing is measured for one that is open.
        groups: by level, those to choose among, where not all were looked at.
    """
    worth = []
    for each in levels:
        # Jointly ranked, large enough, and not refused for what no other choice could mend.
        own, count = each.draft, len(each.draft.order)
        failed = {gate.name for gate in own.gates if not gate.passed}
        worth.append(
            each.level in UNIT_LEVELS
            and settings.verification.rounds > 1
            and own.statistics.scorer == "output_projection"
            and count > max(1, settings.verification.rounds_from * own.statistics.channels_before)
            and failed <= _FORETOLD
            and breaker_gate(breakers.get(each.level, BreakerStatus())).passed
        )
    try:
        return [
            _again(bundle, settings, each, network, groups.get(each.level))
            if is_worth
            else Rounds(each)
            for each, is_worth in zip(levels, worth, strict=True)
        ]
    except _NotMeasured as stopped:
        return [
            Rounds(_with_fallback(each, stopped.fallback) if is_worth else each)
            for each, is_worth in zip(levels, worth, strict=True)
        ]


def _again(
    bundle: CheckpointBundle,
    settings: Settings,
    level: LevelDraft,
    network: Remeasuring,
    groups: Collection[str] | None,
) -> Rounds:
    of_level, first = UNIT_LEVELS[level.level], level.draft
    ranked = level.ranked
    if ranked is None:  # It was ranked elsewhere.
        ranked = of_level.ranked(bundle, settings, scorer="output_projection", shard=groups)
    blind = of_level.blind_spots(bundle)
    ranked = replace(ranked, plan=replace(ranked.plan, fallbacks=blind))
    choosing = _InRounds(level.level, network, settings.verification.rounds)
    plan = of_level.choose(bundle, settings, ranked, choosing.decide)
    others = tuple(taken for taken in first.fallbacks if taken not in blind)
    found = judged(bundle, settings, plan, key=first.key, fallbacks=others)
    refusal = rejection(found.draft.gates) or ("" if found.draft.order else plan.nothing)
    if refusal:
        return Rounds(_with_fallback(level, Fallback(rung=REFUSED, reason=refusal)))
    return Rounds(found, choosing.count)


def _with_fallback(level: LevelDraft, fallback: Fallback) -> LevelDraft:
    taken = (*level.draft.fallbacks, fallback)
    return replace(level, draft=replace(level.draft, fallbacks=taken))


class _NotMeasured(Exception):
    """The network cannot be measured again."""

    def __init__(self, fallback: Fallback) -> None:
        super().__init__(fallback.reason)
        self.fallback = fallback


@dataclass
class _InRounds:
    """Chooses a given number of units, a part in every round."""

    level: Level
    network: Remeasuring
    rounds: int
    count: int = field(default=0, init=False)
    """How many rounds were made."""

    def decide(self, ranking: Ranking, bundle: CheckpointBundle, quota: int) -> Choice:
        """Up to ``quota`` units (a :data:`elesh.analysis.selection.choose.Decide`)."""
        candidates, taken = ranking.candidates, _Taken()
        order: Order = StaticOrder(candidates, ranking.scores)
        for number in range(1, self.rounds + 1):
            target = math.ceil(quota * number / self.rounds)
            if target <= len(taken.removal_order.units):
                continue
            order = self._round(candidates, taken, target)
            self.count += 1
        units, projections = taken.removal_order.units.tolist(), ranking.projections
        selection = Selection(
            order,
            taken.removal_order,
            kept_for_multiple=frozenset(taken.kept_for_multiple - set(units)),
            noise=_cheapest(order, taken.noise, quota - len(units)),
        )
        if projections is None or not units:
            return Choice(selection, quota, 1.0, None, 0.0, scorer="margins")
        return Choice(
            selection,
            quota,
            scale=1.0,
            prediction=predict(projections, candidates, len(units), lambda _: units),
            output_mean_square=output_mean_square(bundle.gates.values(), projections.weights),
            errors=taken.errors,
            scorer="margins",
        )

    def _round(self, candidates: Candidates, taken: _Taken, target: int) -> LogitGapOrder:
        """Take more units, ``target`` in all. Their costs are derivatives at the midpoint of the
        cut, which are exact to second order (decision 0020)."""
        gone = taken.removal_order.units.tolist()
        masked = self._entries(candidates, gone)
        now = self._measured(masked)
        first = LogitGapOrder(candidates, now.gradients, now.values, gone)
        look_ahead = first.pick(target - len(gone), _quiet(first)[0]).units.tolist()
        midpoint = self._measured(masked, self._entries(candidates, look_ahead))
        order = LogitGapOrder(candidates, midpoint.gradients, now.values, gone)
        quiet, noise = _quiet(order)
        removal_order = order.pick(target - len(gone), quiet)
        removal_order, kept_for_multiple = rounded_to_multiples(
            order, removal_order, target - len(gone), quiet
        )
        taken.kept_for_multiple |= kept_for_multiple
        taken.noise = noise
        taken.errors |= {unit: order.errors.get(unit, 0.0) for unit in removal_order.units.tolist()}
        taken.removal_order = taken.removal_order.then(removal_order)
        return order

    def _measured(self, masked: Sequence[Entry], halved: Sequence[Entry] = ()) -> LogitGaps:
        found = self.network.remeasure(masked, halved)
        if isinstance(found, Fallback):
            raise _NotMeasured(found)
        return found

    def _entries(self, candidates: Candidates, units: Sequence[int]) -> list[Entry]:
        lost = candidates.by_group(units)
        return [(self.level, name, unit) for name, own in lost.items() for unit in own]


@dataclass
class _Taken:
    """What all rounds took so far."""

    removal_order: RemovalOrder = field(default_factory=RemovalOrder)
    errors: dict[int, float] = field(default_factory=dict)
    kept_for_multiple: set[int] = field(default_factory=set)
    noise: set[int] = field(default_factory=set)
    """Units that the last round found inside the noise."""


def _cheapest(order: Order, units: Collection[int], count: int) -> frozenset[int]:
    ranked = sorted(units, key=lambda unit: (order.costs[unit], unit))
    return frozenset(ranked[: max(count, 0)])


def _quiet(order: LogitGapOrder) -> tuple[Bools, set[int]]:
    """[C] the units that cost less than one taken at random, and the free ones that do not.

    The rule of :func:`elesh.analysis.selection.choose.without_noise`: what a unit costs alone, two
    standard errors included, must be less than what a unit does on average.
    """
    everything = np.ones(order.candidates.count, dtype=np.bool_)
    free, (costs, errors) = order.free(everything), order.alone()
    limit = float(costs[free].mean()) if free.any() else 0.0
    noisy = free & (costs + 2 * errors >= limit) & (limit > 0)
    return ~noisy, set(np.flatnonzero(noisy).tolist())
