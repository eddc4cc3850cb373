"""Adaptive thresholds: below which score a unit may be marked, by training stage and boldness.

Promises: pure functions; the threshold never falls below 1e-8 but for one reason, that fewer
units may go than lie below it. How the metrics are weighted by stage is in
:mod:`elesh.analysis.importance.scores`; which stage a phase of the schedule is, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from leyline import InvalidField, Phase
from leyline.arrays import require_finite

__all__ = ["BASE", "FLOOR", "SafetyLevel", "Stage", "adaptive_threshold", "stage_at"]


class Stage(StrEnum):
    """How far training is."""

    EARLY = "early"
    MID = "mid"
    LATE = "late"


class SafetyLevel(StrEnum):
    """How much may be risked."""

    CONSERVATIVE = "conservative"
    MODERATE = "moderate"
    AGGRESSIVE = "aggressive"


def _by_level(conservative: float, moderate: float, aggressive: float) -> dict[SafetyLevel, float]:
    return dict(zip(SafetyLevel, (conservative, moderate, aggressive), strict=True))


BASE: Mapping[Stage, Mapping[SafetyLevel, float]] = {
    Stage.EARLY: _by_level(0.001, 0.01, 0.05),
    Stage.MID: _by_level(0.005, 0.02, 0.1),
    Stage.LATE: _by_level(0.01, 0.05, 0.2),
}
"""Base thresholds (FACTS, "Importance")."""
FLOOR = 1e-8
"""What lies below is dead whatever the rest says (the document's marking threshold)."""


def stage_at(phase: Phase) -> Stage:
    """The training stage of a phase, as in :func:`elesh.analysis.importance.scores.weights_at`."""
    if phase is Phase.PREPARATION:
        return Stage.EARLY
    return Stage.LATE if phase in (Phase.AGGRESSIVE, Phase.VALIDATION) else Stage.MID


def adaptive_threshold(
    scores: npt.ArrayLike,
    sparsity: float,
    stage: Stage,
    level: SafetyLevel,
    *,
    capacity: int | None = None,
) -> float:
    """The score strictly below which units may be marked.

    ``.3 base + .4 quantile(sparsity) + .3 (mean - 2 std)``, at least 1e-8 (FACTS, "Importance");
    the quantile interpolates linearly, the standard deviation is the population's. The parts are
    on the scores' scale but for the base, so scores should be shares of a largest (0 to 1).

    Args:
        scores: [C], finite, higher is more important; C >= 1.
        sparsity: the share of units that is aimed at, 0 to 1.
        capacity: how many units may go at most (a group's minimum, for example): where more scores
            lie below, the threshold falls to the score of the first unit that must stay, even
            under 1e-8. None: no limit.

    Raises:
        InvalidField: if there are no scores, or sparsity or capacity are out of range.
        NotFinite: naming the first score that is not finite.
    """
    row = np.asarray(scores, dtype=np.float64)
    if row.ndim != 1 or not row.size:
        raise InvalidField("scores", "a vector of at least one score", f"shape {row.shape}")
    require_finite("scores", row)
    if not 0 <= sparsity <= 1:
        raise InvalidField("sparsity", "a share from 0 to 1", sparsity)
    if capacity is not None and capacity < 0:
        raise InvalidField("capacity", "a number >= 0", capacity)
    statistical = float(row.mean() - 2 * row.std())
    blended = 0.3 * BASE[stage][level] + 0.4 * float(np.quantile(row, sparsity)) + 0.3 * statistical
    threshold = max(blended, FLOOR)
    if capacity is None or capacity >= row.size:
        return threshold
    return min(threshold, float(np.partition(row, capacity)[capacity]))
