"""Predictions: honest about selection, and right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from networks import floats, gate

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import (
    Projections,
    gains_of,
    output_error,
    output_mean_square,
    predict,
)
from elesh.analysis.selection.removal_order import JointOrder
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
    return order.pick(count, np.ones(len(columns), dtype=np.bool_)).units.tolist()


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
    seen = output_error(projections.columns, choose(50, projections.columns)) * projections.unit**2
    prediction = predict(projections, candidates(500), 50, lambda part: choose(50, part))
    assert seen < 5  # on its own samples the choice looks nearly free
    assert prediction.output_error == pytest.approx(
        50, rel=0.4
    )  # 50 independent units of variance 1
    assert prediction.output_error + 2 * prediction.standard_error > prediction.random


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
        errors.append(predict(projections, candidates(20), 5, lambda part: range(5)).standard_error)
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
    assert output_mean_square([*gates_of(whole).values(), small]) == pytest.approx(true, rel=1e-4)


def masked(name: str, columns: np.ndarray, loss_increases: list[float]) -> GateStatistics:
    """A group whose units were masked one at a time, with what that did to the loss."""
    zero = np.zeros(len(loss_increases), np.float32)
    return GateStatistics(
        layer_name=name,
        projections=floats(columns),
        first_order=zero,
        second_order=zero,
        removal_rise=floats(np.array(loss_increases)),
        removal_error=floats(np.full(len(loss_increases), 0.01)),
    )


def test_where_units_were_masked_a_cost_is_the_mean_of_its_column_and_its_rise() -> None:
    rng = np.random.default_rng(6)
    loss_increases = {"g": [0.1, 0.4, 0.2], "h": [0.8, -0.3]}
    gates = {n: masked(n, rng.standard_normal((50, len(r))), r) for n, r in loss_increases.items()}
    both = Candidates(("g", "h"), (3, 2), (3, 2), (1, 1))
    projections = Projections.of(gates, both)
    costs = np.square(projections.columns.astype(np.float64)).sum(axis=1) * projections.unit**2
    floor = 0.25 * np.mean([0.1, 0.4, 0.2, 0.8, -0.3])
    squares = np.concatenate([np.square(g.projections).sum(axis=0) for g in gates.values()])
    shares = squares**0.75 * np.array([0.1, 0.4, 0.2, 0.8, floor]) ** 0.25
    assert costs == pytest.approx(costs.sum() * shares / shares.sum(), rel=1e-5)
    whole = sum(np.square(gate.projections, dtype=np.float64).sum() for gate in gates.values())
    assert costs.sum() == pytest.approx(whole, rel=1e-5)
    # A shard that looks at one group gives its units the same costs.
    alone = Projections.of(gates, Candidates(("h",), (2,), (2,), (1,)))
    shard = np.square(alone.columns.astype(np.float64)).sum(axis=1) * alone.unit**2
    assert shard == pytest.approx(costs[3:], rel=1e-5)


def test_units_that_were_not_masked_count_by_their_fisher_information_a_little() -> None:
    columns = np.random.default_rng(7).standard_normal((20, 3))
    gates = {"g": masked("g", columns, [0.1, 0.2, 0.9])}
    fisher = np.array([1.0, 4.0, 0.01])
    gates["g"] = gates["g"].model_copy(
        update={"removal_error": None, "second_order": floats(fisher)}
    )
    projections = Projections.of(gates, candidates(3))
    squares = np.square(columns).sum(axis=0)
    shares = squares**0.85 * np.maximum(fisher, 0.25 * fisher.mean()) ** 0.15
    costs = np.square(projections.columns.astype(np.float64)).sum(axis=1) * projections.unit**2
    assert costs == pytest.approx(squares.sum() * shares / shares.sum(), rel=1e-5)


def test_predictions_know_nothing_of_gains() -> None:
    """What a set is predicted to move is what its columns say, however they counted."""
    rng = np.random.default_rng(9)
    gates = {"g": masked("g", rng.standard_normal((40, 8)), rng.uniform(0.1, 2, 8).tolist())}
    plain = {"g": gates["g"].model_copy(update={"removal_error": None})}  # Fisher is all zeros.
    found = [
        predict(Projections.of(each, candidates(8)), candidates(8), 3, lambda _: [1, 4, 6])
        for each in (gates, plain)
    ]
    assert Projections.of(plain, candidates(8)).gains.tolist() == [1.0] * 8
    assert found[0].output_error == pytest.approx(found[1].output_error, rel=1e-5)
    assert found[0].standard_error == pytest.approx(found[1].standard_error, rel=1e-5)
    assert found[0].random == pytest.approx(found[1].random, rel=1e-5)


def test_no_rise_above_zero_changes_nothing_and_a_silent_unit_stays_silent() -> None:
    columns = np.random.default_rng(8).standard_normal((20, 2))
    falling = {"g": masked("g", columns, [-0.1, -0.2])}
    assert gains_of(falling, np.ones(20))["g"].tolist() == [1.0, 1.0]
    columns[:, 0] = 0
    silent = gains_of({"g": masked("g", columns, [0.1, 0.2])}, np.ones(20))["g"]
    assert silent[0] == 1, "it has nothing to be multiplied"
    assert np.isfinite(silent).all()
