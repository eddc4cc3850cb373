"""The order by margins: what a unit costs is what its going does to the answers, after the others.

A row's margin m is the log of the odds against the whole network's answer. Taking a unit moves it
by minus the unit's derivative; the cost is by how much the mean of ``softplus(m)`` rises, which is
the cross-entropy against that answer in nats. Unlike a squared movement it tells when an answer
flips, and it counts from where the masked network really is (decision 0060).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Candidates, Doubles, Floats, Ints

from .removal_order import PooledOrder, RemovalOrder, Units, rounded

__all__ = ["LogitGapOrder"]

_BLOCK = 1024


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
            errors[part] = _errors(self._loss_increases(self._columns[part]))
        return self.costs.copy(), errors

    def _resolve(self, pool: Ints, count: int, ceiling: float) -> RemovalOrder:
        units, marginal_costs, groups = list[int](), list[float](), self.candidates.group_of[pool]
        columns, left = self._columns[pool], np.ones(len(pool), dtype=np.bool_)
        for _ in range(min(count, len(pool))):
            open_ = left & (self.capacity[groups] > 0)
            if not open_.any():
                break
            costs = np.full(len(pool), math.inf)
            costs[open_] = _means(self._loss_increases(columns[open_]))
            best = int(rounded(costs).argmin())
            if costs[best] > ceiling:
                break
            unit = int(pool[best])
            self.errors[unit] = float(_errors(self._loss_increases(columns[best : best + 1]))[0])
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
            self.costs[part] = _means(self._loss_increases(self._columns[part]))

    def _loss_increases(self, columns: Floats) -> Floats:
        """[c, N]: by how much each unit's going raises the loss of each row, in nats."""
        now = self._logit_gaps.astype(np.float32)
        loss_increases: Floats = _loss(now - columns) - _loss(now)
        return loss_increases

    def _parts(self) -> list[slice]:
        return [slice(at, at + _BLOCK) for at in range(0, self.candidates.count, _BLOCK)]


def _loss(margins: Floats) -> Floats:
    loss: Floats = np.logaddexp(np.float32(0), margins)
    return loss


def _means(loss_increases: Floats) -> Doubles:
    means: Doubles = loss_increases.mean(axis=1, dtype=np.float64)
    return means


def _errors(loss_increases: Floats) -> Doubles:
    """From the scatter of the rows."""
    errors: Doubles = loss_increases.std(axis=1, dtype=np.float64) / math.sqrt(
        loss_increases.shape[1]
    )
    return errors
