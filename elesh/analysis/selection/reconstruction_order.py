"""The removal order for cuts with weight reconstruction: units that the kept ones predict best go
first.

Where the consumers of a cut are re-solved, a removed unit is not lost but predicted, and only
the residual of the prediction moves the outputs. With A the second moments of what enters a
consumer and D those of the outputs' derivatives there, removing a set R of a group costs about
``tr(A_{R|K} D_RR)``: A_{R|K} is the residual's covariance given the kept channels K (the Schur
complement), and residual and derivative are taken for independent (as in K-FAC, Martens and
Grosse 2015). One more unit i costs ``D~_ii / (A_KK^-1)_ii``, where D~ is D of the network after
the re-solving so far (optimal brain surgeon, Hassibi and Stork 1993, with outputs instead of the
loss).

Heads own several inputs each, so ``i`` is a block there, and costs are traces. Positions of one
sample are not independent of each other: see :func:`residual_slopes`.

Promises: float64; the marginal costs of a set add up to its cost; a unit's cost is never below
zero; each step is a downdate of the inverse of a unit's rank and touches one group only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Bools, Candidates, Doubles, Floats, Ints
from leyline import GateStatistics

from .removal_order import Order, RemovalOrder, Units, rounded

RIDGE = 1e-4
"""As a share of the mean second moment: what the trainer's re-solving uses."""
_BLOCK = 64
"""Columns of changes that are added up before the matrix itself changes."""


def reconstruction_fault(gates: Mapping[str, GateStatistics]) -> str:
    """Why there is no such order; empty where there is."""
    if not gates:
        return "no gate statistics"
    without = sorted(name for name, gate in gates.items() if gate.input_moments is None)
    return f"no input moments of {', '.join(without[:3])}" if without else ""


class _Pending:
    """A [W, W] matrix that changes by products of low rank: so many are added up at a time, so that
    a change costs a few rows and not the whole matrix."""

    def __init__(self, matrix: Doubles) -> None:
        self._matrix, self._used = matrix, 0
        self._left = np.zeros((len(matrix), _BLOCK))
        self._right = np.zeros((_BLOCK, len(matrix)))

    def rows(self, own: slice) -> Doubles:
        """[w, W]: some rows as they are now."""
        used = self._used
        now: Doubles = self._matrix[own] + self._left[own, :used] @ self._right[:used]
        return now

    def add(self, left: Doubles, right: Doubles) -> None:
        """Add ``left @ right``."""
        width = left.shape[1]
        if self._used + width > self._left.shape[1]:
            self._apply()
        if width > self._left.shape[1]:
            self._matrix += left @ right
            return
        self._left[:, self._used : self._used + width] = left
        self._right[self._used : self._used + width] = right
        self._used += width

    def clear(self, own: slice) -> None:
        """Set some rows and columns to zero, for good."""
        self._matrix[own] = self._matrix[:, own] = 0.0
        self._left[own] = self._right[:, own] = 0.0

    def _apply(self) -> None:
        self._matrix += self._left[:, : self._used] @ self._right[: self._used]
        self._used = 0


class _Consumer:
    """What enters one consumer from the units of a group, and what it does there.

    A unit of width w owns w inputs that lie side by side; W = C w.

    Args:
        moments: [W, W], second moments of the units.
        slopes: [W, W], second moments of the derivatives at the units.
    """

    def __init__(self, moments: npt.ArrayLike, slopes: Doubles, width: int = 1) -> None:
        self.width = width
        inner = np.array(moments, dtype=np.float64)
        strength = RIDGE * float(inner.diagonal().mean())
        if strength > 0:
            inner[np.diag_indices(len(inner))] += strength
            inverse, slopes = _inverse(inner), np.array(slopes, dtype=np.float64)
        else:  # Silent units: nothing is lost with them.
            inverse, slopes = np.eye(len(inner)), np.zeros_like(inner)
        self._inverse = _Pending(inverse)
        self._slopes = _Pending(slopes)
        # The diagonal blocks of both, [C, w, w]; of removed units the first is zero.
        self._precision, self._own_slopes = self._blocks(inverse), self._blocks(slopes)

    @property
    def costs(self) -> Doubles:
        """[C]: of removing one more unit; of removed ones 0."""
        if self.width == 1:
            single, slopes = self._precision[:, 0, 0], self._own_slopes[:, 0, 0]
            alone = np.divide(slopes, single, out=np.zeros(len(slopes)), where=single != 0)
            return np.maximum(alone, 0.0)
        precision = self._precision.copy()
        gone = ~precision.any((1, 2))
        precision[gone] = np.eye(self.width)
        found = np.einsum("cij,cji->c", np.linalg.inv(precision), self._own_slopes)
        return np.maximum(np.where(gone, 0.0, found), 0.0)

    def remove(self, unit: int) -> None:
        """Predict ``unit`` from the kept ones from now on."""
        own = slice(unit * self.width, (unit + 1) * self.width)
        rows = self._inverse.rows(own)
        one = self.width == 1
        solved = rows / rows[:, own] if one else np.linalg.solve(rows[:, own], rows)
        shares: Doubles = np.asarray(-solved.T, np.float64)
        self._inverse.add(shares, rows)
        self._inverse.clear(own)
        self._precision += self._products(shares, rows)
        self._precision[unit] = 0.0
        shares[own] = 0.0
        slope = self._slopes.rows(own)
        change: Doubles = slope + 0.5 * slope[:, own] @ shares.T
        self._slopes.add(shares, change)
        self._slopes.add(change.T, shares.T)
        self._slopes.clear(own)
        both = self._products(shares, change)
        self._own_slopes += both + both.transpose(0, 2, 1)
        self._own_slopes[unit] = 0.0

    def _blocks(self, matrix: Doubles) -> Doubles:
        """[C, w, w]: the blocks of a matrix along its diagonal."""
        width, count = self.width, len(matrix) // self.width
        cut = matrix.reshape(count, width, count, width)
        return cut[np.arange(count), :, np.arange(count)].copy()

    def _products(self, left: Doubles, right: Doubles) -> Doubles:
        """[C, w, w]: the blocks of ``left @ right`` along its diagonal."""
        width = self.width
        if width == 1:
            products: Doubles = (left[:, 0] * right[0])[:, None, None]
            return products
        first, second = left.reshape(-1, width, width), right.T.reshape(-1, width, width)
        found: Doubles = np.einsum("cik,cjk->cij", first, second)
        return found


def _inverse(matrix: Doubles) -> Doubles:
    """The inverse of a positive definite matrix, by Cholesky: a third of the work of any other."""
    from scipy.linalg import lapack  # only here: a worker that starts need not load it

    factor, failed = lapack.dpotrf(matrix, lower=True)
    if not failed:
        inverse, failed = lapack.dpotri(factor, lower=True)
    if failed:  # Rounding took the smallest eigenvalue below zero.
        return np.asarray(np.linalg.inv(matrix), dtype=np.float64)
    lower = np.tril(inverse)
    return np.ascontiguousarray(lower + np.tril(lower, -1).T)


def residual_slopes(
    moments: npt.ArrayLike, sample_moments: npt.ArrayLike, slopes: npt.ArrayLike
) -> Doubles:
    """[W, W]: what the residuals at one consumer are weighed with.

    A residual moves the outputs by the sum over positions of slope times residual. What is the
    same at all positions of a sample meets the slopes' sum; what differs meets their deviations
    from the mean. How much of a residual is the same is not known before it is known what goes:
    taken for the share of the input itself.

    Args:
        moments: [W, W] second moments of the inputs.
        sample_moments: [W] of their means over a sample's positions.
        slopes: [2, W, W] second moments of the slopes' sums, and of their deviations.
    """
    whole = np.asarray(moments, dtype=np.float64).diagonal()
    steady = np.asarray(sample_moments, dtype=np.float64)
    same = np.divide(steady, whole, out=np.ones_like(whole), where=whole > 0).clip(0.0, 1.0)
    summed, left = np.asarray(slopes, dtype=np.float64)
    weighed: Doubles = summed * np.sqrt(np.outer(same, same))
    weighed += left * np.sqrt(np.outer(1 - same, 1 - same))
    return weighed


class ReconstructionOrder(Order):
    """Costs are of the residuals; those of a group change with every unit that it loses.

    Args:
        gates: with input moments, of every candidate's group.
        capable: only groups that may lose units are looked at; the others' costs stay zero.
    """

    def __init__(
        self,
        candidates: Candidates,
        gates: Mapping[str, GateStatistics],
        *,
        capable: bool = False,
    ) -> None:
        super().__init__(candidates, np.zeros(candidates.count))
        self._gates = [gates[name] for name in candidates.names]
        self._consumers: list[list[_Consumer]] = [[] for _ in candidates.names]
        for group, capacity in enumerate(candidates.capacities):
            if capacity or not capable:
                self._begin(group)

    def pick(self, count: int, among: Bools, ceiling: float = math.inf) -> RemovalOrder:
        """The cheapest of every group is kept at hand: a step changes one group's costs only."""
        taken: list[int] = []
        marginal_costs: list[float] = []
        places, keys = self._cheapest(range(len(self.candidates.names)), among)
        while len(taken) < count:
            group = int(keys.argmin())
            best = int(places[group])
            if keys[group] == math.inf or (marginal_cost := float(self.costs[best])) > ceiling:
                break
            taken.append(best)
            marginal_costs.append(marginal_cost)
            self.take([best])
            places[[group]], keys[[group]] = self._cheapest([group], among)
        return RemovalOrder(np.array(taken, dtype=np.int64), np.array(marginal_costs))

    def _cheapest(self, groups: Iterable[int], among: Bools) -> tuple[Ints, Floats]:
        """The place of the cheapest unit of each group that can be taken, and its rounded cost;
        infinity where none can."""
        places, keys = list[int](), list[np.float32]()
        for group in groups:
            span = self.candidates.span(group)
            key, place = np.float32(math.inf), 0
            if self.capacity[group] > 0 and span.stop > span.start:
                free = among[span] & ~self.taken[span]
                costs = rounded(np.where(free, self.costs[span], math.inf))
                place = int(costs.argmin())
                key = costs[place]
            places.append(span.start + place)
            keys.append(key)
        return np.array(places, np.int64), np.array(keys, np.float32)

    def take(self, units: Units) -> None:
        self._mark(units, gone=True)
        for unit in units:
            group = int(self.candidates.group_of[unit])
            for consumer in self._consumers[group]:
                consumer.remove(unit - int(self.candidates.starts[group]))
        for group in {int(self.candidates.group_of[unit]) for unit in units}:
            self._marginal_cost(group)

    def put_back(self, units: Units) -> None:
        self._mark(units, gone=False)
        for group in {int(self.candidates.group_of[unit]) for unit in units}:
            self._begin(group)

    def _begin(self, group: int) -> None:
        """The group with all its units, less those that are taken."""
        gate = self._gates[group]
        inputs, steady, slopes = gate.input_moments, gate.sample_moments, gate.input_slopes
        if inputs is None or steady is None or slopes is None:
            raise ValueError(f"no input moments of {gate.layer_name}")
        units = gate.projections.shape[1]
        self._consumers[group] = [  # What every site of the group feeds.
            _Consumer(moments, residual_slopes(moments, *own), len(moments) // units)
            for moments, *own in zip(inputs, steady, slopes, strict=True)
        ]
        for unit in np.flatnonzero(self.taken[self.candidates.span(group)]).tolist():
            for consumer in self._consumers[group]:
                consumer.remove(unit)
        self._marginal_cost(group)

    def _marginal_cost(self, group: int) -> None:
        costs = sum(consumer.costs for consumer in self._consumers[group])
        self.costs[self.candidates.span(group)] = costs
