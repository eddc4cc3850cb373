"""Output projections of all candidates as one matrix, and what a cut is predicted to do.

Promises: predictions in float64, honest about selection: what was chosen on one half of the
samples is judged on the other half, so that a set which only fits the noise shows its true cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Candidates, Doubles, Floats
from leyline import GateStatistics

__all__ = [
    "Prediction",
    "Projections",
    "gains_of",
    "output_mean_square",
    "predict",
    "sample_weights",
]


_BLOCK = 1024
"""Columns copied at a time."""
_MASKED = 0.25
"""How much a rise measured under a unit's mask counts beside its column (decision 0065)."""
_FISHER = 0.15
"""How much the Fisher information of a unit's gate counts beside its column (decision 0086)."""
_FLOOR = 0.25
_DOUBT = 0.5
"""Margins well below this share of the median margin all count alike."""


@dataclass(frozen=True)
class Projections:
    """G of all candidates, transposed: one row a unit.

    Even samples come first, then the odd ones: each half is a contiguous part of every row.
    Values are scaled by a power of two (exact) to a mean square near 1, so that no product of
    float32 overflows or vanishes whatever the units of the outputs are. Where margins are known,
    samples count by :func:`sample_weights`, and columns by :func:`gains_of`.
    """

    columns: Floats
    """[C, N] float32."""
    unit: float
    """``columns * unit`` is G, sample by sample times its weight, unit by unit times its gain."""
    weights: Doubles
    """[N] of the samples, in the order of the calibration."""
    gains: Doubles
    """[C] what columns are multiplied by, for choosing; predictions are made without."""

    @classmethod
    def of(cls, gates: Mapping[str, GateStatistics], candidates: Candidates) -> Projections:
        """The matrix of the candidates' gates.

        Args:
            gates: of all groups of their level, every candidate's among them: gains are shares
                of the whole, so that shards agree.
        """
        parts = [gates[name].projections for name in candidates.names]
        samples = parts[0].shape[0]
        weights = sample_weights(gates[candidates.names[0]])
        order = np.r_[0:samples:2, 1:samples:2]
        total = sum(float(np.einsum("ij,ij->", p, p, dtype=np.float64)) for p in parts)
        mean_square = total / max(1, candidates.count * samples)
        unit = 2.0 ** round(math.log2(mean_square) / 2) if mean_square > 0 else 1.0
        columns = np.empty((candidates.count, samples), np.float32)
        for group, part in enumerate(parts):
            columns[candidates.span(group)] = (part * (weights / unit)[:, None])[order].T
        known = gains_of(gates, weights)
        gains = np.concatenate([known[name] for name in candidates.names])
        columns *= gains[:, None].astype(np.float32)
        return cls(columns, unit, weights, gains)

    @property
    def sums_of_squares(self) -> Doubles:
        """[C]: the sum of squares of each column."""
        return np.asarray(np.einsum("ij,ij->i", self.columns, self.columns, dtype=np.float64))

    def moved(self, row: Doubles) -> Doubles:
        """``row``, one value a sample in the order of the calibration, like the columns."""
        weighted = row * self.weights
        return np.concatenate([weighted[0::2], weighted[1::2]]) / self.unit

    @property
    def folds(self) -> tuple[Floats, Floats]:
        """Views on the even and the odd samples."""
        middle = (self.columns.shape[1] + 1) // 2
        return self.columns[:, :middle], self.columns[:, middle:]


def sample_weights(gate: GateStatistics) -> Doubles:
    """[N]: how much each sample's movement counts, 1 in the mean square.

    What a movement of the outputs does depends on how far the sample is from another class: by
    its margin m, ``1 / sqrt(m^2 + (median |m| / 2)^2)``; the second term keeps a few doubtful
    samples from deciding alone. All ones where margins are not known.
    """
    if gate.margins is None:
        return np.ones(len(gate.projections))
    margins = np.asarray(gate.margins, dtype=np.float64)
    weights = 1 / np.sqrt(margins**2 + max(_DOUBT * float(np.median(np.abs(margins))), 1e-6) ** 2)
    return np.asarray(weights / np.sqrt(np.mean(weights**2)))


def gains_of(gates: Mapping[str, GateStatistics], weights: Doubles) -> dict[str, Doubles]:
    """[C] by group: what columns are multiplied by when units are chosen.

    The square of a column says how far the outputs move, not how much that hurts. What does say
    so, for each unit alone, is the rise of the loss under its mask where units were masked
    (attention heads), else the Fisher information of its gate. A unit's cost becomes the geometric
    mean of both, the latter counting ``_MASKED`` or ``_FISHER``, with the sum of all squares as it
    was, so that costs keep their unit. Nothing counts less than ``_FLOOR`` of the mean in it. Ones
    where that mean is not above zero.

    Args:
        gates: of one level; masked, or taken for not masked, all together.
        weights: [N] of the samples.
    """
    masked = all(gate.removal_error is not None for gate in gates.values())
    share = _MASKED if masked else _FISHER
    harm = {
        name: np.asarray(gate.removal_rise if masked else gate.second_order, dtype=np.float64)
        for name, gate in gates.items()
    }
    mean = float(np.concatenate(list(harm.values())).mean())
    if not mean > 0:
        return {name: np.ones(len(row)) for name, row in harm.items()}
    squares = {
        name: np.einsum("nc,n->c", np.square(gate.projections, dtype=np.float64), weights**2)
        for name, gate in gates.items()
    }
    costs = {
        name: squares[name] ** (1 - share) * np.maximum(row, _FLOOR * mean) ** share
        for name, row in harm.items()
    }
    total = sum(float(row.sum()) for row in costs.values())
    scale = sum(float(row.sum()) for row in squares.values()) / total if total > 0 else 1.0
    return {
        name: np.sqrt(
            np.divide(scale * row, squares[name], out=np.ones_like(row), where=squares[name] > 0)
        )
        for name, row in costs.items()
    }


@dataclass(frozen=True)
class Prediction:
    """Mean squared movements of the outputs along random directions."""

    output_error: float
    """Of the cut, in squared output units."""
    standard_error: float
    """Of it: from the scatter of the samples within the folds, or half the difference between the
    two folds, whichever is larger."""
    random: float | None
    """What a random cut of as many units among the same candidates would do on average; None: not
    known."""


def output_error(columns: Floats, units: Sequence[int], gains: Doubles | None = None) -> float:
    """``mean((sum of the units' columns)^2)`` over the samples, in float64; without the gains."""
    return float(np.mean(_squares(columns, units, gains)))


def _squares(columns: Floats, units: Sequence[int], gains: Doubles | None = None) -> Doubles:
    """[N]: ``(sum of the units' columns)^2``, each column divided by its gain."""
    moved: Doubles = np.zeros(columns.shape[1])
    for start in range(0, len(units), _BLOCK):
        part = list(units[start : start + _BLOCK])
        if gains is None:
            moved += columns[part].sum(axis=0, dtype=np.float64)
        else:
            moved += (1 / gains[part]) @ columns[part]
    return moved * moved


def predict(
    projections: Projections,
    candidates: Candidates,
    count: int,
    choose: Callable[[Floats], Sequence[int]],
) -> Prediction:
    """The output error of cutting ``count`` units as ``choose`` does, cross-fitted.

    Each fold of the samples, even and odd, chooses a set that is judged on the other fold. The mean
    is an unbiased figure for a choice made from half of the samples, hence on the safe side for the
    choice made from all. (On its own samples, a greedy choice among C > N columns can predict
    nearly no error at all.)

    Args:
        choose: from columns [C, n] of some samples to the units that go.
    """
    even, odd = projections.folds
    scale = projections.unit**2
    gains = projections.gains
    held_out = [
        _squares(odd, choose(even), gains) * scale,
        _squares(even, choose(odd), gains) * scale,
    ]
    first, second = (float(squares.mean()) for squares in held_out)
    scatter = math.sqrt(sum(float(squares.var()) / len(squares) for squares in held_out)) / 2
    return Prediction(
        output_error=(first + second) / 2,
        standard_error=max(scatter, abs(first - second) / 2),
        random=_random_output_error(projections, candidates, count) * scale,
    )


def _random_output_error(projections: Projections, candidates: Candidates, count: int) -> float:
    """Expected output error of ``count`` units drawn at random from groups that may lose any.

    For k of n columns: f^2 (sum s)^2 + f (1 - f) n / (n - 1) (sum of squares - s^2 / n), with
    f = k / n and s the sum of all columns, averaged over the samples.
    """
    columns, gains = projections.columns, projections.gains
    capacities = np.array(candidates.capacities)[candidates.group_of]
    rows = np.flatnonzero(capacities > 0)
    total = len(rows)
    if total < 2 or not count:
        return output_error(columns, rows.tolist(), gains) if count else 0.0
    share = count / total
    whole = output_error(columns, rows.tolist(), gains)
    squares = float((projections.sums_of_squares / gains**2)[rows].sum())
    spread = (squares / columns.shape[1] - whole / total) * total / (total - 1)
    return float(share**2 * whole + share * (1 - share) * spread)


def output_mean_square(gates: Iterable[GateStatistics], weights: Doubles | None = None) -> float:
    """An estimate of the outputs' mean square along the same directions, from G alone.

    Args:
        weights: [N] of the samples; all ones if not given.

    In a piecewise linear network the columns of a complete cut add up to the output without its
    biases (Euler's theorem); a group on a branch adds up to what the branch contributes. The
    largest group sum is therefore the best estimate at hand.
    """
    sums: list[npt.NDArray[Any]] = [g.projections.sum(axis=1, dtype=np.float64) for g in gates]
    if weights is not None:
        sums = [total * weights for total in sums]
    return max((float(np.mean(total * total)) for total in sums), default=0.0)
