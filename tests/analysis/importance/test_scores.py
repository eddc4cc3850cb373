"""Scores: the document's formula to the letter, and the sign of the single-removal score."""

from __future__ import annotations

import numpy as np
import pytest
from networks import floats, vectors

from elesh.analysis.importance.scores import (
    EARLY,
    LATE,
    MID,
    Weights,
    magnitude,
    multi_metric,
    shares,
    single_removal,
    weights_at,
)
from elesh.settings import ChannelAnalysis
from leyline import ChannelImportanceData, GateStatistics, Phase


def data(taylor: list[float], size: list[float], frequency: list[float]) -> ChannelImportanceData:
    return ChannelImportanceData(
        layer_name="g",
        taylor_importance=floats(taylor),
        magnitude_importance=floats(size),
        activation_frequency=floats(frequency),
    )


def test_the_mix_is_the_weighted_sum_of_shares_of_each_groups_largest() -> None:
    groups = [data([2, 4], [5, 1], [1, 0.5]), data([0, 0], [3, 3], [0.25, 0.5])]
    assert multi_metric(groups, MID) == pytest.approx(
        [
            0.5 * 0.5 + 0.3 * 1 + 0.2 * 1,
            0.5 * 1 + 0.3 * 0.2 + 0.2 * 0.5,
            0.3 * 1 + 0.2 * 0.5,
            0.3 * 1 + 0.2 * 1,
        ]
    )


def test_the_weights_follow_the_training_phase_and_sum_to_one() -> None:
    assert (EARLY, MID, LATE) == ((0.3, 0.5, 0.2), (0.5, 0.3, 0.2), (0.6, 0.2, 0.2))
    assert all(sum(weights) == pytest.approx(1) for weights in (EARLY, MID, LATE))
    assert weights_at(Phase.CONSERVATIVE, ChannelAnalysis()) == MID
    own = ChannelAnalysis(taylor_weight=0.2, magnitude_weight=0.2, frequency_weight=0.6)
    assert [weights_at(phase, own) for phase in Phase] == [
        EARLY,
        Weights(0.2, 0.2, 0.6),
        Weights(0.2, 0.2, 0.6),
        LATE,
        LATE,
    ]


def test_the_mix_does_not_depend_on_the_scale_of_a_groups_metrics() -> None:
    one = vectors("a", 20, np.random.default_rng(0))
    scaled = one.model_copy(
        update={
            "taylor_importance": one.taylor_importance * np.float32(2**20),
            "magnitude_importance": one.magnitude_importance * np.float32(2**-20),
        }
    )
    np.testing.assert_array_equal(multi_metric([one], MID), multi_metric([scaled], MID))


def test_shares_survive_zeros_and_the_smallest_numbers() -> None:
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    assert shares([0, 0, tiny, tiny, 3.4e38], [0, 2, 4]).tolist() == [0, 0, 1, 1, 1]


def test_magnitude_is_the_share_of_the_largest_norm() -> None:
    assert magnitude([data([1, 1], [2, 8], [0, 0])]).tolist() == [0.25, 1]


def test_the_single_removal_score_is_the_rise_of_a_quadratic_loss() -> None:
    slope, curvature = 0.3, 0.8

    def loss(gate: float) -> float:
        return slope * (gate - 1) + curvature / 2 * (gate - 1) ** 2

    gate = GateStatistics(
        layer_name="g",
        projections=np.zeros((2, 1), np.float32),
        first_order=floats([slope]),
        second_order=floats([curvature]),
    )
    assert single_removal(gate)[0] == pytest.approx(loss(0) - loss(1))
