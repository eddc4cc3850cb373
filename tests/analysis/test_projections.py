"""Predictions: honest about selection, and right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from networks import floats, gate

from elesh.analysis.candidates import Candidates
from elesh.analysis.orders import JointOrder
from elesh.analysis.projections import Projections, damage, output_energy, predict
from leyline import GateStatistics


def gates_of(columns: np.ndarray) -> dict[str, GateStatistics]:
    """One group whose projections are ``columns`` [N, C]."""
    zero = np.zeros(columns.shape[1], np.float32)
    one = GateStatistics(
        layer_name="g", projections=floats(columns), first_order=zero, second_order=zero
    )
    return {"g": one}


def candidates(count: int) -> Candidates:
    return Candidates(("g",), (count,), (count,), (1,))


def choose(count: int, columns: np.ndarray) -> list[int]:
    order = JointOrder(candidates(len(columns)), columns)
    return order.pick(count, np.ones(len(columns), dtype=np.bool_)).units


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
def test_projections_of_any_size_are_kept_exactly_in_a_power_of_two(scale: float) -> None:
    g = floats(np.random.default_rng(0).standard_normal((9, 5)) * scale)
    projections = Projections.of(gates_of(g), candidates(5))
    assert np.log2(projections.unit) % 1 == 0
    restored = projections.columns.astype(np.float64) * projections.unit
    np.testing.assert_array_equal(restored, g[[0, 2, 4, 6, 8, 1, 3, 5, 7]].T)
    assert 0.1 < float(np.mean(projections.columns.astype(np.float64) ** 2)) < 10


def test_a_set_that_only_fits_the_noise_is_predicted_at_its_true_cost() -> None:
    rng = np.random.default_rng(1)
    g = rng.standard_normal((64, 500))
    projections = Projections.of(gates_of(g), candidates(500))
    seen = damage(projections.columns, choose(50, projections.columns)) * projections.unit**2
    prediction = predict(projections, candidates(500), 50, lambda part: choose(50, part))
    assert seen < 5  # on its own samples the choice looks nearly free
    assert prediction.damage == pytest.approx(50, rel=0.4)  # 50 independent units of variance 1
    assert prediction.damage + 2 * prediction.error > prediction.random


def test_the_damage_of_a_random_cut_is_that_of_many_drawn_ones() -> None:
    rng = np.random.default_rng(2)
    g = rng.standard_normal((40, 30)) + rng.standard_normal((40, 1))
    projections = Projections.of(gates_of(g), candidates(30))
    prediction = predict(projections, candidates(30), 7, lambda part: range(7))
    drawn = [np.mean(g[:, rng.permutation(30)[:7]].sum(axis=1) ** 2) for _ in range(4000)]
    assert prediction.random == pytest.approx(np.mean(drawn), rel=0.05)


def test_the_error_shrinks_with_the_samples() -> None:
    errors = []
    for samples in (64, 4096):
        g = np.random.default_rng(3).standard_normal((samples, 20))
        projections = Projections.of(gates_of(g), candidates(20))
        errors.append(predict(projections, candidates(20), 5, lambda part: range(5)).error)
    assert errors[1] < errors[0] / 3


def test_the_output_energy_of_a_linear_network_is_that_of_its_outputs() -> None:
    rng = np.random.default_rng(4)
    inputs, first, last = (rng.standard_normal(s) for s in ((500, 8), (8, 20), (20, 10)))
    directions = rng.standard_normal((500, 10))
    hidden = inputs @ first
    whole = hidden * (directions @ last.T)  # activation times d(v . output)/d(activation)
    true = np.mean((directions * (hidden @ last)).sum(axis=1) ** 2)
    branch = gate("branch", 4, rng, samples=500)
    small = branch.model_copy(update={"projections": branch.projections / np.float32(1000)})
    assert output_energy([*gates_of(whole).values(), small]) == pytest.approx(true, rel=1e-4)
