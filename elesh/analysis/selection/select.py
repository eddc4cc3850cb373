"""Which units go: redundant ones first, then the cheapest, within quota, minimum and multiples.

Promises: at most ``quota`` units, no group below its minimum, every group that loses anything
ends at its multiple, and the unit that a redundant one was removed in favour of stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elesh.analysis.candidates import Bools
from elesh.analysis.importance.redundancy import Pair

from .removal_order import JointOrder, Order, RemovalOrder, cheapest_first, rounded

__all__ = ["Selection", "select", "rounded_to_multiples"]


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
    """Units that stay because they lie inside the noise (:mod:`.noise`)."""

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

    @property
    def max_cost(self) -> float:
        """The highest marginal cost; 0 where nothing was taken."""
        return self.removal_order.max_cost if len(self.removal_order.units) else 0.0


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
