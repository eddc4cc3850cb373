"""Scores: the document's formula to the letter, and the sign of the single-removal score."""

from __future__ import annotations

import numpy as np
import pytest
from networks import floats, vectors

from elesh.analysis.scores import (
    EARLY,
    LATE,
    MID,
    Weights,
    magnitude,
    multi_metric,
    set_removal,
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


def with_margins(seed: int, units: int, samples: int = 64) -> GateStatistics:
    rng = np.random.default_rng(seed)
    moves = rng.standard_normal((samples, units)).astype(np.float16)
    margins = (-3 + rng.standard_normal(samples)).astype(np.float32)
    own = np.logaddexp(0, margins[:, None] - moves.astype(float))
    return GateStatistics(
        layer_name=f"g{seed}",
        projections=np.ones((samples, units), np.float32),
        first_order=np.zeros(units, np.float32),
        second_order=np.zeros(units, np.float32),
        removal_rise=floats((own - np.logaddexp(0, margins)[:, None]).mean(0) + 0.25),
        moves=moves,
        margins=margins,
    )


def test_margins_of_a_set_move_together_and_a_rise_grows_like_the_logarithm() -> None:
    first, second = with_margins(1, 4), with_margins(2, 3)
    second = second.model_copy(update={"margins": first.margins})
    assert first.moves is not None
    assert second.moves is not None
    assert first.margins is not None
    rise, error = set_removal({"a": first, "b": second}, {"a": [0, 2], "b": [1]})
    moved = first.moves[:, [0, 2]].astype(float).sum(1) + second.moves[:, 1]
    margins = first.margins.astype(float)
    rises = np.logaddexp(0, margins - moved) - np.logaddexp(0, margins)
    beyond = sum(
        float(gate.removal_rise[u] if gate.removal_rise is not None else 0)
        - float(np.mean(np.logaddexp(0, margins - gate.moves[:, u]) - np.logaddexp(0, margins)))
        for gate, u in ((first, 0), (first, 2), (second, 1))
        if gate.moves is not None
    )
    assert rise == pytest.approx(np.log1p(rises.mean() + beyond), rel=1e-4)
    assert error == pytest.approx(rises.std() / 8 / (1 + rises.mean() + beyond), rel=1e-4)


def test_a_set_of_one_is_a_single_removal_and_without_margins_a_set_is_their_sum() -> None:
    gate = with_margins(3, 5)
    assert gate.removal_rise is not None
    alone, _ = set_removal({"a": gate}, {"a": [3]})
    assert alone == pytest.approx(np.log1p(float(gate.removal_rise[3])), rel=1e-4)
    plain = gate.model_copy(update={"moves": None, "margins": None})
    rise, error = set_removal({"a": plain}, {"a": [0, 3]})
    assert rise == pytest.approx(float(gate.removal_rise[[0, 3]].sum()), rel=1e-6)
    assert error is None
