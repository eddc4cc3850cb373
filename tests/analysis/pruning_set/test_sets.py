"""Sets: one unit is a single removal, many are bent as networks bend, errors are of the samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from networks import floats

from elesh.analysis.pruning_set.draft import set_removal
from leyline import GateStatistics


def gate(
    moves: np.ndarray, margins: np.ndarray, loss_increases: list[float], *, masked: bool = False
) -> GateStatistics:
    count = moves.shape[1]
    return GateStatistics(
        layer_name="g",
        projections=np.ones(moves.shape, np.float32),
        first_order=np.zeros(count, np.float32),
        second_order=np.zeros(count, np.float32),
        removal_rise=floats(loss_increases),
        removal_error=np.zeros(count, np.float32) if masked else None,
        moves=moves.astype(np.float16),
        margins=margins.astype(np.float32),
    )


def drawn(seed: int, units: int, samples: int = 64) -> GateStatistics:
    rng = np.random.default_rng(seed)
    moves = rng.standard_normal((samples, units))
    margins = -3 + np.random.default_rng(99).standard_normal(samples)
    return gate(moves, margins, list(rng.random(units)))


def columns(statistics: GateStatistics) -> tuple[np.ndarray, np.ndarray]:
    assert statistics.moves is not None
    assert statistics.margins is not None
    return statistics.moves.astype(float), statistics.margins.astype(float)


def written_out(margins: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The rises that decision 0084 states, sample by sample."""
    way = math.sqrt(np.mean(shift**2) / np.mean(margins**2))
    left = (1 - math.exp(-way)) / way
    scatter = shift - np.mean(shift * margins) / np.mean(margins**2) * margins
    spread = left * math.sqrt(np.mean(scatter**2))
    lift = 2.5**2 * (math.sqrt(1 + (spread / 2.5) ** 2) - 1)
    loss = [math.log1p(math.exp(m - left * s + lift)) for m, s in zip(margins, shift, strict=True)]
    return np.array(loss) - np.log1p(np.exp(margins))


def test_nothing_removed_costs_nothing() -> None:
    assert set_removal({"a": drawn(1, 4)}, {"a": []}) == (0, 0)
    assert set_removal({"a": drawn(1, 4)}, {}) == (0, None)


@pytest.mark.parametrize("masked", [False, True])
def test_a_set_of_one_is_its_single_removal(masked: bool) -> None:
    moves, margins = columns(drawn(2, 5))
    told = [0.5, 0.001, -0.25, 4.0, 0.125]
    gates = {"a": gate(moves, margins, told, masked=masked)}
    for unit, rise in enumerate(told):
        assert set_removal(gates, {"a": [unit]})[0] == pytest.approx(rise)


def test_a_set_rises_as_its_sum_does_and_by_the_mean_of_what_singles_know_beyond_that() -> None:
    first, second = drawn(1, 4), drawn(2, 3)
    rise, error = set_removal({"a": first, "b": second}, {"a": [0, 2], "b": [1]})
    (a, margins), (b, _) = columns(first), columns(second)
    together = written_out(margins, a[:, 0] + a[:, 2] + b[:, 1])
    singles = [(first, a, 0), (first, a, 2), (second, b, 1)]
    beyond = [
        g.removal_rise[u] - written_out(margins, moves[:, u]).mean()
        for g, moves, u in singles
        if g.removal_rise is not None
    ]
    assert rise == pytest.approx(together.mean() + np.mean(beyond), rel=1e-5)
    assert error == pytest.approx(together.std() / 8, rel=1e-5)


def test_what_masking_measured_beyond_the_moves_is_added_and_scatters_nothing() -> None:
    margins, still = np.linspace(-6, -2, 32), np.zeros((32, 3))
    told = [0.5, 0.25, 0.125]
    masked = {"a": gate(still, margins, told, masked=True)}
    assert set_removal(masked, {"a": [0, 1, 2]})[0] == pytest.approx(sum(told))
    predicted = {"a": gate(still, margins, told)}
    assert set_removal(predicted, {"a": [0, 1, 2]})[0] == pytest.approx(sum(told) / 3)
    waving = np.tile([[1.0], [-1.0]], (16, 3))
    level = np.full(32, -6.0)
    moved = np.logaddexp(0, -6 - waving.sum(1) * (1 - math.exp(-0.5)) / 0.5).mean()
    own = np.logaddexp(0, -6 - waving[:, 0] * (1 - math.exp(-1 / 6)) * 6).mean()
    before = np.logaddexp(0, -6.0)
    rise, _ = set_removal({"a": gate(waving, level, told, masked=True)}, {"a": [0, 1, 2]})
    assert rise == pytest.approx(moved - before + sum(told) - 3 * (own - before), rel=1e-4)


@pytest.mark.parametrize("layers", [10, 1000])
def test_channels_in_a_row_leave_of_the_margin_what_a_product_leaves(layers: int) -> None:
    # Every layer loses a share 2 / layers of what passes: derivatives add up to twice the margin,
    # of which (1 - 2 / layers) ** layers, about exp(-2), is really left.
    margins = np.linspace(-8, -4, 32)
    moves = np.repeat((2 / layers * margins)[:, None], layers, axis=1)
    moves = moves.astype(np.float16).astype(float)
    own = [float(np.mean(written_out(margins, moves[:, 0])))] * layers
    rise, _ = set_removal({"a": gate(moves, margins, own)}, {"a": list(range(layers))})
    left = (np.logaddexp(0, margins * math.exp(-2)) - np.logaddexp(0, margins)).mean()
    assert rise == pytest.approx(left, rel=2e-3)


def test_the_error_is_that_of_the_mean_over_the_samples() -> None:
    few = drawn(7, 3)
    moves, margins = columns(few)
    assert few.removal_rise is not None
    many = gate(np.tile(moves, (4, 1)), np.tile(margins, 4), few.removal_rise.tolist())
    rise, error = set_removal({"a": few}, {"a": [0, 1, 2]})
    again, smaller = set_removal({"a": many}, {"a": [0, 1, 2]})
    assert again == pytest.approx(rise)
    assert error is not None
    assert smaller == pytest.approx(error / 2)


def test_margins_of_nothing_are_moved_as_far_as_derivatives_say() -> None:
    moves, margins = np.full((16, 1), -0.25), np.zeros(16)
    rise, _ = set_removal({"a": gate(moves, margins, [0.125])}, {"a": [0]})
    assert rise == pytest.approx(0.125)
    pair = gate(np.full((16, 2), -0.01), margins, [0.005, 0.005])
    assert set_removal({"a": pair}, {"a": [0, 1]})[0] == pytest.approx(0.01, rel=0.02)


def test_without_margins_a_set_is_the_sum_of_single_removals() -> None:
    plain = drawn(3, 5).model_copy(update={"moves": None, "margins": None})
    assert plain.removal_rise is not None
    rise, error = set_removal({"a": plain}, {"a": [0, 3]})
    assert rise == pytest.approx(float(plain.removal_rise[[0, 3]].sum()), rel=1e-6)
    assert error is None
