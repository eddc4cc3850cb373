"""Adaptive thresholds: the document's figures, the blend, the floor and the room."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis.importance.scores import EARLY, LATE, weights_at
from elesh.analysis.selection.schedule import (
    BASE,
    SafetyLevel,
    Stage,
    adaptive_threshold,
    stage_at,
)
from elesh.settings import ChannelAnalysis
from leyline import InvalidField, NotFinite, Phase

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=50)


def test_base_thresholds_are_the_documents() -> None:
    assert {stage: tuple(levels.values()) for stage, levels in BASE.items()} == {
        Stage.EARLY: (0.001, 0.01, 0.05),
        Stage.MID: (0.005, 0.02, 0.1),
        Stage.LATE: (0.01, 0.05, 0.2),
    }
    assert list(BASE[Stage.MID]) == ["conservative", "moderate", "aggressive"]


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("level", SafetyLevel)
def test_the_blend_is_three_tenths_base_four_quantile_three_statistical(
    stage: Stage, level: SafetyLevel
) -> None:
    scores = [0.0, 1.0, 0.5, 0.9, 0.6]  # mean .6, variance .124, quantile(.375) = .55
    expected = 0.3 * BASE[stage][level] + 0.4 * 0.55 + 0.3 * (0.6 - 2 * math.sqrt(0.124))
    assert adaptive_threshold(scores, 0.375, stage, level) == pytest.approx(expected)


def test_the_threshold_never_falls_below_the_floor() -> None:
    spread = [0.0] * 9 + [1.0]  # mean .1, std .3: the statistical part is -.15
    assert adaptive_threshold(spread, 0.1, Stage.EARLY, SafetyLevel.CONSERVATIVE) == 1e-8


@given(SCORES, st.floats(0, 1), st.integers(0, 60))
def test_never_more_units_lie_below_than_there_is_room_for(
    scores: list[float], sparsity: float, capacity: int
) -> None:
    free = adaptive_threshold(scores, sparsity, Stage.LATE, SafetyLevel.AGGRESSIVE)
    held = adaptive_threshold(
        scores, sparsity, Stage.LATE, SafetyLevel.AGGRESSIVE, capacity=capacity
    )
    below = int((np.array(scores) < held).sum())
    assert below <= capacity
    assert held <= free
    if int((np.array(scores) < free).sum()) <= capacity:
        assert below == int((np.array(scores) < free).sum()), "room that suffices changes nothing"


def test_room_that_is_short_is_used_up() -> None:
    scores = [0.5, 0.1, 0.4, 0.2, 0.3]
    held = [
        adaptive_threshold(scores, 1, Stage.LATE, SafetyLevel.AGGRESSIVE, capacity=capacity)
        for capacity in (0, 1, 2)
    ]
    assert held == [0.1, 0.2, pytest.approx(0.2651, abs=1e-4)], "two lie below the free threshold"


@given(SCORES, st.sampled_from(Stage), st.sampled_from(SafetyLevel))
def test_more_sparsity_never_lowers_the_threshold(
    scores: list[float], stage: Stage, level: SafetyLevel
) -> None:
    thresholds = [adaptive_threshold(scores, s, stage, level) for s in (0, 0.2, 0.5, 1)]
    assert all(b >= a - 1e-12 for a, b in pairwise(thresholds))


def test_stages_are_those_of_the_metric_weights() -> None:
    own = ChannelAnalysis(taylor_weight=0.2, magnitude_weight=0.2, frequency_weight=0.6)
    named = {EARLY: Stage.EARLY, LATE: Stage.LATE}
    for phase in Phase:
        assert stage_at(phase) is named.get(weights_at(phase, own), Stage.MID)


def test_scores_and_shares_out_of_range_are_refused_by_name() -> None:
    level = SafetyLevel.MODERATE
    with pytest.raises(InvalidField, match="at least one score"):
        adaptive_threshold([], 0.1, Stage.MID, level)
    with pytest.raises(NotFinite, match=r"scores\[1\]"):
        adaptive_threshold([0.1, math.nan], 0.1, Stage.MID, level)
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidField, match="sparsity"):
            adaptive_threshold([0.1], sparsity, Stage.MID, level)
    with pytest.raises(InvalidField, match="capacity"):
        adaptive_threshold([0.1], 0.1, Stage.MID, level, capacity=-1)
