"""Scores of single units: the document's mix, magnitude, and what one removal alone would cost.

Promises: pure functions of arrays, one value a unit, higher means more important. Sets of units
are not ranked by these where output projections are there: see
:mod:`elesh.analysis.selection.removal_order`; what a set costs:
:mod:`elesh.analysis.pruning_set.sets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles
from elesh.settings import ChannelAnalysis
from leyline import ChannelImportanceData, GateStatistics, Phase

__all__ = [
    "EARLY",
    "LATE",
    "MID",
    "Weights",
    "fisher",
    "magnitude",
    "multi_metric",
    "shares",
    "single_removal",
    "weights_at",
]


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
    """[C]: the predicted rise of the loss when one unit alone is removed, in nats.

    What the trainer predicted, where it did; else to second order: a gate goes from 1 to 0, so the
    rise is ``-g + h/2``, the gate gradient enters with a minus (ARCHITECTURE, "What we rank by").
    For explanations of single units, not for choosing sets.
    """
    if gate.removal_rise is not None:
        return np.asarray(gate.removal_rise, dtype=np.float64)
    first = np.asarray(gate.first_order, dtype=np.float64)
    return np.asarray(-first + 0.5 * np.asarray(gate.second_order, dtype=np.float64))


def fisher(gates: Sequence[GateStatistics]) -> Doubles:
    """[C] of all groups side by side: half the Fisher information of each unit's gate, in nats.

    ``E[(dL/dgate)^2] / 2`` with labels sampled from the model's own predictions: to second order
    the rise of the loss where training has converged, as the expected gradient is zero there and
    the Fisher information is the Hessian (Theis et al. 2018, "Faster gaze prediction with dense
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
