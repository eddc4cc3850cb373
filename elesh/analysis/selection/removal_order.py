"""Removal orders: by fixed scores, by joint cost, or by the effect on the answers.

Promises: an order takes the cheapest unit that is allowed, one at a time, never more from a group
than its capacity; ties break by index after the costs are rounded to 16 significant bits (relative
1.5e-5, well over the noise of float32 sums, so that another BLAS ranks alike). The same input gives
the same units for every thread count: threads share out fixed blocks, BLAS runs on one thread
inside each, and what is added up over blocks or units is float64 in a fixed order.

The order by logit gaps: a row's gap m is the log of the odds against the whole network's answer.
Taking a unit moves it by minus the unit's derivative; the cost is by how much the mean of
``softplus(m)`` rises, which is the cross-entropy against that answer in nats. Unlike a squared
movement it tells when an answer flips, and it counts from where the masked network really is
(decision 0060).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from elesh.analysis.candidates import Bools, Candidates, Doubles, Floats, Ints

_POOL = 1024
"""Units resolved among themselves exactly; a net with no more of them is resolved exactly."""
_STEP = 32
"""Units taken from a pool before all costs are measured afresh."""
_BLOCK = 4096
"""Units a GEMV works on at a time; fixed, so that results do not depend on the thread count."""
_DROPPED_BITS = 8
Units = Sequence[int] | Ints
"""Places in the row of candidates."""
SHRINKAGE = 0.5
"""How much of the cross terms between units is believed by default (decision 0020)."""


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """Units in the order they were taken, with what each cost at that moment."""

    units: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    marginal_costs: Doubles = field(default_factory=lambda: np.zeros(0))

    def then(self, later: RemovalOrder) -> RemovalOrder:
        """These units and the later ones."""
        units = np.concatenate([self.units, later.units])
        return RemovalOrder(units, np.concatenate([self.marginal_costs, later.marginal_costs]))

    def without(self, units: Collection[int]) -> RemovalOrder:
        """The units but these, in the same order."""
        kept = ~np.isin(self.units, list(units))
        return RemovalOrder(self.units[kept], self.marginal_costs[kept])

    @property
    def max_cost(self) -> float:
        """The highest marginal cost; minus infinity where nothing was taken."""
        return float(self.marginal_costs.max(initial=-math.inf))


def rounded(costs: Doubles) -> Floats:
    """Costs rounded to 16 significant bits, in float32; infinity stays infinity."""
    keys = costs.astype(np.float32)
    bits = keys.view(np.int32)
    bits += 1 << (_DROPPED_BITS - 1)
    bits &= -(1 << _DROPPED_BITS)
    return keys


def cheapest_first(costs: Doubles, count: int | None = None) -> Ints:
    """The places of the ``count`` lowest costs, rising, after rounding, ties by index.

    All places if no count is given.
    """
    bits = (rounded(costs) + np.float32(0)).view(np.int32)  # + 0: minus zero is zero
    # As integers, negative floats fall where they should rise; with the place in the low half all
    # keys differ, and numpy's fastest sort, which is not stable, will do.
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys = (keys << 32) | np.arange(len(keys))
    if count is not None and count < len(keys):
        keys = np.partition(keys, count)[:count]
    return np.sort(keys) & 0xFFFFFFFF


class Order(ABC):
    """Units that can be taken and put back.

    Attributes:
        costs: [C] what each unit would cost next.
        taken: [C] whether it is gone.
        capacity: [G] how many units each group may still lose.
    """

    def __init__(self, candidates: Candidates, costs: Doubles) -> None:
        self.candidates = candidates
        self.costs = costs
        self.taken = np.zeros(candidates.count, dtype=np.bool_)
        self.capacity = np.array(candidates.capacities, dtype=np.int64)

    @abstractmethod
    def pick(self, count: int, among: Bools, ceiling: float = math.inf) -> RemovalOrder:
        """Take up to ``count`` of the units ``among``, cheapest first, none above ``ceiling``."""

    def take(self, units: Units) -> None:
        """Take these units, whatever they cost."""
        self._mark(units, gone=True)

    def put_back(self, units: Units) -> None:
        """Undo having taken these units."""
        self._mark(units, gone=False)

    def withhold(self, units: Units) -> None:
        """Count these units as gone already: nothing that costs are measured from has them."""
        self._mark(units, gone=True)

    def free(self, among: Bools) -> Bools:
        """[C]: which units can be taken now."""
        free: Bools = among & ~self.taken & (self.capacity > 0)[self.candidates.group_of]
        return free

    def _mark(self, units: Units, *, gone: bool) -> None:
        places = np.asarray(units, dtype=np.int64)
        self.taken[places] = gone
        change = np.bincount(self.candidates.group_of[places], minlength=len(self.capacity))
        self.capacity += -change if gone else change


class StaticOrder(Order):
    """Fixed scores [C]: what one unit costs does not depend on the others."""

    def pick(self, count: int, among: Bools, ceiling: float = math.inf) -> RemovalOrder:
        count = max(count, 0)
        units = np.flatnonzero(self.free(among) & (self.costs <= ceiling))
        chosen = units[cheapest_first(self.costs[units], count)]
        lost = np.bincount(self.candidates.group_of[chosen], minlength=len(self.capacity))
        if (lost > self.capacity).any():  # Only now does the order of all units matter.
            order = units[cheapest_first(self.costs[units])]
            groups = self.candidates.group_of[order]
            chosen = order[_rank_in_group(groups, len(self.capacity)) < self.capacity[groups]][
                :count
            ]
        self._mark(chosen, gone=True)
        return RemovalOrder(chosen, self.costs[chosen])


def _rank_in_group(groups: Ints, count: int) -> Ints:
    """How often each entry of ``groups`` occurred before."""
    # Stable sorts of 16-bit numbers are by radix, ten times as fast.
    by_group = np.argsort(groups.astype(np.uint16 if count < 1 << 16 else np.int64), kind="stable")
    sizes = np.bincount(groups, minlength=count)
    firsts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[by_group] = np.arange(len(groups)) - np.repeat(firsts, sizes)
    return ranks


class PooledOrder(Order):
    """Costs that depend on all that went before, too expensive to measure afresh after every unit.

    The 1024 cheapest units are resolved among themselves exactly, and after 32 of them all costs
    are measured afresh. With at most 1024 units the order is exact; beyond, a unit outside the
    pool that became the cheapest within those 32 waits for the next pool.
    """

    def pick(self, count: int, among: Bools, ceiling: float = math.inf) -> RemovalOrder:
        removal_order = RemovalOrder()
        while (left := count - len(removal_order.units)) > 0:
            pool = np.flatnonzero(self.free(among))
            whole, limit = len(pool) <= _POOL, ceiling
            if not whole:
                keys = rounded(self.costs[pool])
                pool = np.sort(pool[np.argpartition(keys, _POOL - 1)[:_POOL]])
                limit = min(ceiling, float(self.costs[pool].max()))  # Beyond, others are cheaper.
            step = self._resolve(pool, left if whole else min(left, _STEP), limit)
            removal_order = removal_order.then(step)
            if not len(step.units) or whole:
                break
        return removal_order

    @abstractmethod
    def _resolve(self, pool: Ints, count: int, ceiling: float) -> RemovalOrder:
        """Take up to ``count`` units of the pool, each time the cheapest; costs are fresh then."""


class JointOrder(PooledOrder):
    """Output projections: what a unit costs depends on all that went before it.

    Removing a set S moves the outputs, along each sample's direction, by about the sum of its
    columns; the output error is ``mean((r - sum over S of G)^2)``, so the next cost of i would be
    ``mean(G_i^2) - 2 mean(r G_i)`` with r what is left after S (ARCHITECTURE, "What we rank by").
    Columns are derivatives, and units go for good: that two movements cancel is less certain than
    that each of them happens. So the second term counts by ``shrinkage`` only.

    Exact one-at-a-time greedy reads all of G for every unit taken. A pool is resolved by its Gram
    matrix, and all costs are measured afresh from r: one GEMM and one pass over G for 32 units.
    Products are float32 (relative error some 1e-6 of the columns' lengths); r and the costs are
    float64. Extra memory: the 1024 x 1024 Gram matrix and the pool's columns.

    Args:
        columns: [C, N] float32, G transposed: one row a unit, one column a sample.
        moved: [N] r at the start: what earlier cuts have moved already; zero if not given.
        threads: blocks of the products run on so many threads.
        shrinkage: how much of the cross terms counts, 0 to 1.
    """

    def __init__(
        self,
        candidates: Candidates,
        columns: Floats,
        *,
        moved: Doubles | None = None,
        threads: int = 1,
        shrinkage: float = SHRINKAGE,
    ) -> None:
        samples = columns.shape[1]
        self._mean_squares: Doubles = (
            np.einsum("ij,ij->i", columns, columns, dtype=np.float64) / samples
        )
        super().__init__(candidates, self._mean_squares.copy())
        self._columns = columns
        self._threads = threads
        self._shrinkage = shrinkage
        self._blas = ThreadpoolController()
        self._left = np.zeros(samples) if moved is None else np.array(moved, dtype=np.float64)
        if moved is not None:
            self._measure()

    def take(self, units: Units) -> None:
        super().take(units)
        self._move(units, -1.0)

    def put_back(self, units: Units) -> None:
        super().put_back(units)
        self._move(units, 1.0)

    def _resolve(self, pool: Ints, count: int, ceiling: float) -> RemovalOrder:
        if not len(pool):
            return RemovalOrder()
        taken: list[int] = []
        marginal_costs: list[float] = []
        costs = self.costs[pool].copy()
        gram, groups = self._gram(pool), self.candidates.group_of[pool]
        capacity = self.capacity.copy()
        for _ in range(count):
            best = int(rounded(costs).argmin())
            marginal_cost = float(costs[best])
            if marginal_cost == math.inf or marginal_cost > ceiling:
                break
            taken.append(best)
            marginal_costs.append(marginal_cost)
            costs += gram[best]
            costs[best] = math.inf
            capacity[groups[best]] -= 1
            if not capacity[groups[best]]:
                costs[groups == groups[best]] = math.inf
        self.take(pool[taken])
        return RemovalOrder(pool[taken], np.array(marginal_costs))

    def _gram(self, pool: Ints) -> Floats:
        """[P, P] float32: by how much taking one unit of the pool raises the cost of another."""
        left = self._columns[pool]
        right = left * np.float32(2 * self._shrinkage / left.shape[1])
        out = np.empty((len(pool), len(pool)), np.float32)

        def block(part: slice) -> None:
            np.matmul(left[part], right.T, out=out[part])

        self._each_block(block, len(pool), _POOL // 4)
        return out

    def _move(self, units: Units, sign: float) -> None:
        """Add the columns of ``units`` to r, with ``sign``, and measure all costs afresh."""
        if len(units):
            self._left += sign * self._columns[np.asarray(units)].sum(axis=0, dtype=np.float64)
            self._measure()

    def _measure(self) -> None:
        right = (self._left * (2 * self._shrinkage / len(self._left))).astype(np.float32)

        def block(part: slice) -> None:
            self.costs[part] = self._mean_squares[part] - self._columns[part] @ right

        self._each_block(block, len(self._columns), _BLOCK)

    def _each_block(self, work: Callable[[slice], None], count: int, size: int) -> None:
        """``work`` on blocks of fixed size, so that the thread count cannot change a product."""
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        with self._blas.limit(limits=1, user_api="blas"):
            if self._threads == 1 or len(parts) == 1:
                for part in parts:
                    work(part)
            else:
                with ThreadPoolExecutor(self._threads) as pool:
                    list(pool.map(work, parts))


_ROWS = 1024


class LogitGapOrder(PooledOrder):
    """Units by what their going does to the margins of N rows.

    Products are float32, means float64.

    Args:
        moves: [N, size] by group: derivatives of the margins with respect to the units' gates.
        margins: [N] float32, with the units that are gone already at zero.
        gone: units (places in the row) that are gone already.

    Attributes:
        errors: by unit that was taken, the standard error of its cost.
    """

    def __init__(
        self,
        candidates: Candidates,
        moves: Mapping[str, npt.NDArray[np.float32]],
        margins: Floats,
        gone: Units = (),
    ) -> None:
        rows = np.concatenate([moves[name] for name in candidates.names], axis=1)
        self._columns: Floats = np.ascontiguousarray(rows.T, dtype=np.float32)
        self._logit_gaps = np.array(margins, dtype=np.float64)
        self.errors: dict[int, float] = {}
        super().__init__(candidates, np.zeros(candidates.count))
        self.withhold(gone)
        self._measure()

    def take(self, units: Units) -> None:
        super().take(units)
        self._move(units, -1.0)
        self._measure()

    def put_back(self, units: Units) -> None:
        super().put_back(units)
        self._move(units, 1.0)
        self._measure()

    def alone(self) -> tuple[Doubles, Doubles]:
        """[C] what each unit costs next, and the standard error of that."""
        errors = np.zeros(self.candidates.count)
        for part in self._parts():
            errors[part] = _gap_errors(self._loss_increases(self._columns[part]))
        return self.costs.copy(), errors

    def _resolve(self, pool: Ints, count: int, ceiling: float) -> RemovalOrder:
        units, marginal_costs, groups = list[int](), list[float](), self.candidates.group_of[pool]
        columns, left = self._columns[pool], np.ones(len(pool), dtype=np.bool_)
        for _ in range(min(count, len(pool))):
            open_ = left & (self.capacity[groups] > 0)
            if not open_.any():
                break
            costs = np.full(len(pool), math.inf)
            costs[open_] = _gap_means(self._loss_increases(columns[open_]))
            best = int(rounded(costs).argmin())
            if costs[best] > ceiling:
                break
            unit = int(pool[best])
            self.errors[unit] = float(
                _gap_errors(self._loss_increases(columns[best : best + 1]))[0]
            )
            units.append(unit)
            marginal_costs.append(float(costs[best]))
            left[best] = False
            self._mark([unit], gone=True)
            self._move([unit], -1.0)
        self._measure()
        return RemovalOrder(
            np.array(units, dtype=np.int64), np.array(marginal_costs, dtype=np.float64)
        )

    def _move(self, units: Units, sign: float) -> None:
        if len(units):
            self._logit_gaps += sign * self._columns[list(units)].sum(axis=0, dtype=np.float64)

    def _measure(self) -> None:
        for part in self._parts():
            self.costs[part] = _gap_means(self._loss_increases(self._columns[part]))

    def _loss_increases(self, columns: Floats) -> Floats:
        """[c, N]: by how much each unit's going raises the loss of each row, in nats."""
        now = self._logit_gaps.astype(np.float32)
        loss_increases: Floats = _gap_loss(now - columns) - _gap_loss(now)
        return loss_increases

    def _parts(self) -> list[slice]:
        return [slice(at, at + _ROWS) for at in range(0, self.candidates.count, _ROWS)]


def _gap_loss(margins: Floats) -> Floats:
    loss: Floats = np.logaddexp(np.float32(0), margins)
    return loss


def _gap_means(loss_increases: Floats) -> Doubles:
    means: Doubles = loss_increases.mean(axis=1, dtype=np.float64)
    return means


def _gap_errors(loss_increases: Floats) -> Doubles:
    """From the scatter of the rows."""
    errors: Doubles = loss_increases.std(axis=1, dtype=np.float64) / math.sqrt(
        loss_increases.shape[1]
    )
    return errors
