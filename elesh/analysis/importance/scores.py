"""Scores of single units, redundancy, and output projections, which give the cost of a set.

Promises: pure functions of arrays. Single scores (the document's mix, magnitude, what one removal
alone would cost) are one value a unit, higher means more important; sets are not ranked by them
where output projections are there (:mod:`elesh.analysis.selection.removal_order`).

A redundant channel is more similar than the threshold (cosine of activations) to the one that is
kept for it. The channels given up for one form a star around it, not a connected component:
similarity is not transitive, and in a chain of neighbours the ends may be similar to none that
stays.

Predictions from output projections are in float64 and honest about selection: what was chosen on
one half of the samples is judged on the other half, so that a set which only fits the noise shows
its true cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Bools, Candidates, Doubles, Floats
from elesh.analysis.spans import span
from elesh.settings import ChannelAnalysis
from leyline import ChannelImportanceData, GateStatistics, Phase


class Weights(NamedTuple):
    """How much each metric counts in the mix; they sum to 1."""

    taylor: float
    magnitude: float
    frequency: float


EARLY = Weights(0.3, 0.5, 0.2)
MID = Weights(0.5, 0.3, 0.2)
LATE = Weights(0.6, 0.2, 0.2)


def weights_at(phase: Phase, settings: ChannelAnalysis) -> Weights:
    """The mix of a training phase (FACTS, "Importance").

    Early is the preparation phase, late from the aggressive phase on; in between the configured
    weights hold, whose default is the document's mid-training mix.
    """
    if phase is Phase.PREPARATION:
        return EARLY
    if phase in (Phase.AGGRESSIVE, Phase.VALIDATION):
        return LATE
    return Weights(settings.taylor_weight, settings.magnitude_weight, settings.frequency_weight)


def shares(values: npt.ArrayLike, starts: npt.ArrayLike) -> Doubles:
    """Values >= 0 as shares of the largest of their group; a group of zeros stays zero.

    The documents leave the normalisation open. Sizes of gradients, weights and feature maps
    differ from layer to layer, so only shares within a group can be compared across the net; the
    maximum rather than min-max, which would call the weakest of each group worthless even where
    all are alike.

    Args:
        values: [C], groups side by side.
        starts: [G] where each group begins (no group is empty).
    """
    row = np.asarray(values, dtype=np.float64)
    ends = np.append(starts, len(row))
    tops = np.maximum.reduceat(row, ends[:-1])
    tops[tops == 0] = 1
    return np.asarray(row / np.repeat(tops, ends[1:] - ends[:-1]))


def multi_metric(groups: Sequence[ChannelImportanceData], weights: Weights) -> Doubles:
    """[C] of all groups side by side: the weighted sum of the three metrics' shares, 0 to 1."""
    starts = _starts(groups)
    mixed = weights.taylor * shares(_side_by_side(groups, "taylor_importance"), starts)
    mixed += weights.magnitude * shares(_side_by_side(groups, "magnitude_importance"), starts)
    mixed += weights.frequency * shares(_side_by_side(groups, "activation_frequency"), starts)
    return np.asarray(mixed)


def magnitude(groups: Sequence[ChannelImportanceData]) -> Doubles:
    """[C] of all groups side by side: magnitudes as shares of the largest of their group."""
    return shares(_side_by_side(groups, "magnitude_importance"), _starts(groups))


def single_removal(gate: GateStatistics) -> Doubles:
    """[C]: the predicted increase of the loss when one unit alone is removed, in nats.

    What the trainer predicted, where it did; else to second order: a gate goes from 1 to 0, so the
    increase is ``-g + h/2``, and the gate gradient enters with a minus.
    For explanations of single units, not for choosing sets.
    """
    if gate.removal_rise is not None:
        return np.asarray(gate.removal_rise, dtype=np.float64)
    first = np.asarray(gate.first_order, dtype=np.float64)
    return np.asarray(-first + 0.5 * np.asarray(gate.second_order, dtype=np.float64))


def fisher(gates: Sequence[GateStatistics]) -> Doubles:
    """[C] of all groups side by side: half the Fisher information of each unit's gate, in nats.

    ``E[(dL/dgate)^2] / 2`` with labels sampled from the model's own predictions: to second order
    the increase of the loss where training has converged, as the expected gradient is zero there
    and the Fisher information is the Hessian (Theis et al. 2018, "Faster gaze prediction with dense
    networks and Fisher pruning", section 3.2). The gate of a coupled group multiplies all of its
    members, so gradients are summed over them before they are squared (Liu et al. 2021, "Group
    Fisher pruning for practical network compression"). Those papers take the true labels, which
    makes it the empirical Fisher; sampled ones do not vanish with the training loss.
    """
    rows = [np.asarray(gate.second_order, dtype=np.float64) for gate in gates]
    return 0.5 * np.concatenate(rows)


def _side_by_side(groups: Sequence[ChannelImportanceData], metric: str) -> npt.NDArray[np.float32]:
    return np.concatenate([getattr(group, metric) for group in groups])


def _starts(groups: Sequence[ChannelImportanceData]) -> npt.NDArray[np.int64]:
    sizes = np.array([group.size for group in groups], dtype=np.int64)
    return np.asarray(np.cumsum(sizes) - sizes)


_ROWS = 64
"""Rows read at a time: a block of a 2048 x 2048 matrix stays in the cache."""


@dataclass(frozen=True)
class Pair:
    """A redundant channel and the better one that is kept for it."""

    kept: int
    removed: int
    similarity: float


def redundant_pairs(correlations: Floats, scores: Doubles, threshold: float) -> tuple[Pair, ...]:
    """Pairs of channels with cosine similarity above ``threshold``: each group around its best one.

    From the highest score down (ties by index), a channel that was not given up yet is kept, and
    all that are alike to it and neither kept nor given up are given up for it. Opposite channels
    (similarity near -1) do not count as redundant (the design document's rule).

    Args:
        correlations: [C, C] cosine similarities, symmetric; the upper triangle is read once to
            find who has a partner at all, then one row for each channel kept.
        scores: [C], higher is better.

    Returns:
        Pairs in the order of ``removed``.
    """
    limit = np.float32(threshold)
    waiting = _with_partner(correlations, limit)
    pairs: list[Pair] = []
    for kept in np.argsort(-scores, kind="stable"):
        if not waiting[kept]:
            continue
        waiting[kept] = False
        row = correlations[kept]
        for removed in np.flatnonzero(waiting & (row > limit)):
            waiting[removed] = False
            pairs.append(Pair(int(kept), int(removed), float(row[removed])))
    return tuple(sorted(pairs, key=lambda pair: pair.removed))


@span("redundancy")
def pairs_of_groups(
    candidates: Candidates, matrices: Mapping[str, Floats | None], scores: Doubles, threshold: float
) -> tuple[Pair, ...]:
    """The redundant pairs within each group, as places in the row of candidates.

    Args:
        matrices: [C, C] similarities by group, where known.
        scores: [C] of all candidates.
    """
    pairs: list[Pair] = []
    for group, name in enumerate(candidates.names):
        matrix, span = matrices.get(name), candidates.span(group)
        if matrix is not None:
            start = span.start
            found = redundant_pairs(matrix, scores[span], threshold)
            pairs += [Pair(p.kept + start, p.removed + start, p.similarity) for p in found]
    return tuple(pairs)


def _with_partner(correlations: Floats, limit: np.float32) -> Bools:
    """[C]: which channels are alike to any other, from one blocked pass."""
    count = len(correlations)
    found = np.zeros(count, dtype=np.bool_)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        alike = correlations[start:stop, start:] > limit
        np.fill_diagonal(alike, False)
        if alike.any():
            found[start:stop] |= alike.any(axis=1)
            found[start:] |= alike.any(axis=0)
    return found


_BLOCK = 1024
"""Columns copied at a time."""
_MASKED = 0.25
"""How much an increase measured under a unit's mask counts beside its column (decision 0065)."""
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
    samples from deciding alone. All ones where margins are not known of all samples.
    """
    if gate.margins is None or len(gate.margins) < len(gate.projections):
        return np.ones(len(gate.projections))
    margins = np.asarray(gate.margins, dtype=np.float64)
    weights = 1 / np.sqrt(margins**2 + max(_DOUBT * float(np.median(np.abs(margins))), 1e-6) ** 2)
    return np.asarray(weights / np.sqrt(np.mean(weights**2)))


def gains_of(gates: Mapping[str, GateStatistics], weights: Doubles) -> dict[str, Doubles]:
    """[C] by group: what columns are multiplied by when units are chosen.

    The square of a column says how far the outputs move, not how much that hurts. What does say
    so, for each unit alone, is the increase of the loss under its mask where units were masked
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
