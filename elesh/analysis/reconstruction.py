"""The order under redistribution: what goes is what the channels that stay can make up for.

Where the consumers of a cut are re-solved, a removed channel is not lost but predicted, and only
the residual of the prediction moves the outputs. With A the second moments of what enters a
consumer and D those of the outputs' derivatives there, removing a set R of a group costs about
``tr(A_{R|K} D_RR)``: A_{R|K} is the residual's covariance given the kept channels K (the Schur
complement), and residual and derivative are taken for independent (as in K-FAC, Martens and
Grosse 2015). One more channel i costs ``D~_ii / (A_KK^-1)_ii``, where D~ is D of the network after
the re-solving so far (optimal brain surgeon, Hassibi and Stork 1993, with outputs instead of the
loss).

Promises: float64; the prices of a set add up to its cost; a channel's cost is never below zero;
each step is a rank-one downdate of the inverse and touches one group only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leyline import GateStatistics

from .candidates import Bools, Candidates, Doubles
from .orders import Order, Picks, Units, rounded

__all__ = ["ReconstructionOrder", "reconstruction_fault"]

RIDGE = 1e-4
"""As a share of the mean second moment: what the trainer's re-solving uses."""


def reconstruction_fault(gates: Mapping[str, GateStatistics]) -> str:
    """Why there is no order under redistribution; empty where there is."""
    if not gates:
        return "no gate statistics"
    without = sorted(name for name, gate in gates.items() if gate.input_moments is None)
    return f"no input moments of {', '.join(without[:3])}" if without else ""


@dataclass
class _Consumer:
    """What enters one consumer from the units of a group, and what it does there."""

    inverse: Doubles
    """[C, C]: of the second moments of the kept units; rows of removed ones are zero."""
    slopes: Doubles
    """[C, C]: second moments of the derivatives at the kept units, after the re-solving so far."""

    @classmethod
    def of(cls, moments: npt.ArrayLike, slopes: npt.ArrayLike) -> _Consumer:
        inner = np.array(moments, dtype=np.float64)
        strength = RIDGE * float(inner.diagonal().mean())
        if not strength > 0:  # Silent units: nothing is lost with them.
            return cls(np.eye(len(inner)), np.zeros_like(inner))
        inner[np.diag_indices(len(inner))] += strength
        inverse: Doubles = np.asarray(np.linalg.inv(inner), dtype=np.float64)
        return cls(inverse, np.array(slopes, dtype=np.float64))

    @property
    def costs(self) -> Doubles:
        """[C]: of removing one more unit; of removed ones 0."""
        precision = self.inverse.diagonal()
        found = np.divide(
            self.slopes.diagonal(), precision, out=np.zeros(len(precision)), where=precision > 0
        )
        return np.maximum(found, 0.0)

    def remove(self, unit: int) -> None:
        """Predict ``unit`` from the kept ones from now on."""
        row = self.inverse[unit].copy()
        shares = -row / row[unit]
        shares[unit] = 0.0
        self.inverse -= np.outer(row, row / row[unit])
        self.inverse[unit] = self.inverse[:, unit] = 0.0
        slope = self.slopes[unit].copy()
        both = np.outer(shares, slope + 0.5 * slope[unit] * shares)
        self.slopes += both + both.T
        self.slopes[unit] = self.slopes[:, unit] = 0.0


class ReconstructionOrder(Order):
    """Costs are of the residuals; those of a group change with every unit that it loses.

    Args:
        gates: with input moments, of every candidate's group.
    """

    def __init__(self, candidates: Candidates, gates: Mapping[str, GateStatistics]) -> None:
        super().__init__(candidates, np.zeros(candidates.count))
        self._gates = [gates[name] for name in candidates.names]
        self._consumers: list[list[_Consumer]] = [[] for _ in candidates.names]
        for group in range(len(candidates.names)):
            self._begin(group)

    def pick(self, count: int, among: Bools, ceiling: float = math.inf) -> Picks:
        taken: list[int] = []
        prices: list[float] = []
        while len(taken) < count:
            open_ = np.where(self.free(among), self.costs, math.inf)
            best = int(rounded(open_).argmin())
            price = float(open_[best])
            if price == math.inf or price > ceiling:
                break
            taken.append(best)
            prices.append(price)
            self.take([best])
        return Picks(np.array(taken, dtype=np.int64), np.array(prices))

    def take(self, units: Units) -> None:
        super().take(units)
        for unit in units:
            group = int(self.candidates.group_of[unit])
            self._lose(group, unit - int(self.candidates.starts[group]))
        for group in {int(self.candidates.group_of[unit]) for unit in units}:
            self._price(group)

    def put_back(self, units: Units) -> None:
        super().put_back(units)
        for group in {int(self.candidates.group_of[unit]) for unit in units}:
            self._begin(group)

    def _begin(self, group: int) -> None:
        """The group with all its units, less those that are taken."""
        gate = self._gates[group]
        if gate.input_moments is None or gate.input_slopes is None:
            raise ValueError(f"no input moments of {gate.layer_name}")
        pairs = zip(gate.input_moments, gate.input_slopes, strict=True)
        self._consumers[group] = [_Consumer.of(*pair) for pair in pairs]
        for unit in np.flatnonzero(self.taken[self.candidates.span(group)]).tolist():
            self._lose(group, unit)
        self._price(group)

    def _lose(self, group: int, unit: int) -> None:
        for consumer in self._consumers[group]:
            consumer.remove(unit)

    def _price(self, group: int) -> None:
        costs = sum(consumer.costs for consumer in self._consumers[group])
        self.costs[self.candidates.span(group)] = costs
