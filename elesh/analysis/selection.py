"""Which units go: redundant ones first, then the cheapest, within quota, minimum and multiples.

Promises: at most ``quota`` units, no group below its minimum, every group that loses anything
ends at its multiple, and the unit that a redundant one was removed in favour of stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import Bools
from .orders import JointOrder, Order, Picks, cheapest_first, rounded
from .redundancy import Pair

__all__ = ["Selection", "select", "settle_multiples"]


@dataclass(frozen=True)
class Selection:
    """What :func:`select` chose; units are places in the candidates' row."""

    order: Order
    """The order after the last pick: its costs are those of the units that stayed."""
    units: tuple[int, ...]
    prices: dict[int, float]
    """What each unit cost when it was taken."""
    pairs: tuple[Pair, ...]
    """Redundant units that went, each with the one that was kept for it."""
    kept: frozenset[int] = frozenset()
    """Units that stayed because redundant ones went in their favour."""
    too_dear: frozenset[int] = frozenset()
    """Redundant units that the plain order would not have paid for."""
    given_back: frozenset[int] = frozenset()
    """Units that were given back so that a group ends at its multiple."""
    noise: frozenset[int] = frozenset()
    """Units that were given back because they lie inside the noise (:mod:`.noise`)."""

    @property
    def dearest(self) -> float:
        """The highest price paid; 0 where nothing was taken."""
        return max(self.prices.values(), default=0.0)


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
    order = make_order()
    everything = np.ones(order.candidates.count, dtype=np.bool_)
    ceiling = math.inf
    if redundant and isinstance(order, JointOrder):
        ceiling = order.pick(quota, everything).dearest
        order = make_order()
    among = ~everything
    among[[pair.removed for pair in redundant]] = True
    picks = order.pick(quota, among, ceiling)
    too_dear = frozenset(np.flatnonzero(order.free(among) & (order.costs > ceiling)).tolist())
    gone = frozenset(picks.units)
    kept = frozenset(pair.kept for pair in redundant if pair.removed in gone)
    everything[list(kept)] = False
    picks.add(order.pick(quota - len(gone), everything))
    given_back = settle_multiples(order, picks, quota, everything)
    final = frozenset(picks.units)
    pairs = tuple(p for p in redundant if p.removed in final and p.kept not in final)
    return Selection(
        order=order,
        units=tuple(sorted(final)),
        prices=dict(zip(picks.units, picks.prices, strict=True)),
        pairs=pairs,
        kept=frozenset(pair.kept for pair in pairs),
        too_dear=too_dear - final,
        given_back=given_back - final,
    )


def settle_multiples(order: Order, picks: Picks, quota: int, among: Bools) -> frozenset[int]:
    """Give back what breaks a multiple, then spend what is left of the quota on whole blocks.

    Args:
        order: has taken the picks; what it had withheld before ends at its multiples.

    Returns:
        What was given back.
    """
    candidates = order.candidates
    if max(candidates.multiples, default=1) == 1:
        return frozenset()
    by_group: dict[int, list[int]] = {}
    for unit in picks.units:
        by_group.setdefault(int(candidates.group_of[unit]), []).append(unit)
    back: list[int] = []
    for group, units in by_group.items():
        kept = _present(order, group)
        excess = -kept % candidates.multiples[group]
        # A group that is no multiple to begin with may not reach the one above: leave it whole.
        count = excess if kept + excess <= candidates.sizes[group] else len(units)
        back += units[len(units) - count :]
    order.put_back(back)
    picks.drop(back)
    while (block := _cheapest_block(order, quota - len(picks.units), among)).units:
        picks.add(block)
        order.take(block.units)
    return frozenset(back)


def _cheapest_block(order: Order, left: int, among: Bools) -> Picks:
    """The units that bring one group to its next multiple at the lowest cost a unit."""
    candidates, best, best_mean = order.candidates, Picks(), math.inf
    free = order.free(among)
    for group, multiple in enumerate(candidates.multiples):
        span = candidates.span(group)
        size = _present(order, group) % multiple or multiple
        units = np.flatnonzero(free[span]) + span.start
        if size > min(left, int(order.room[group]), len(units)):
            continue
        units = units[cheapest_first(order.costs[units])[:size]]
        mean = float(rounded(np.array([order.costs[units].mean()]))[0])
        if mean < best_mean:
            best_mean = mean
            best = Picks(units.tolist(), order.costs[units].tolist())
    return best


def _present(order: Order, group: int) -> int:
    return int(np.count_nonzero(~order.taken[order.candidates.span(group)]))
