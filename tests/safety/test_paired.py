"""Figures of paired outcomes: what is stated holds on samples that were not looked at."""

from __future__ import annotations

import numpy as np
import pytest

from elesh.safety.measured_gates import Outcomes, accuracy_drop, class_drop, loss_increase


def outcomes(losses: np.ndarray, correct: np.ndarray, classes: int = 2) -> Outcomes:
    number = np.arange(len(losses))
    return Outcomes(losses, correct.astype(bool), number % classes, number)


def drawn(rng: np.random.Generator, count: int, lost: float, won: float) -> tuple[Outcomes, ...]:
    """Before and after a cut that turns right into wrong and wrong into right at these rates."""
    right = rng.random(count) < 0.9
    kind = rng.random(count)
    after = np.where(right, kind >= lost, kind < won)
    losses = rng.exponential(0.3, count)
    loss_increases = rng.normal(0.02, 0.1, count)
    return outcomes(losses, right), outcomes(losses + loss_increases, after)


@pytest.mark.slow
def test_the_interval_holds_the_next_samples_drop_and_the_mean_rise() -> None:
    rng = np.random.default_rng(0)
    inside_drop = inside_rise = 0
    for _ in range(200):
        here, there = drawn(rng, 250, 0.02, 0.1), drawn(rng, 250, 0.02, 0.1)
        _, interval, _ = accuracy_drop(*here, 0.95, 400)
        next_drop = there[0].accuracy - there[1].accuracy
        inside_drop += interval.low - 1e-9 <= next_drop <= interval.high + 1e-9
        _, rise, _ = loss_increase(*here, 0.95, 400)
        inside_rise += rise.low <= 0.02 <= rise.high
    assert inside_drop >= 184
    assert inside_rise >= 180


@pytest.mark.parametrize("count", [50, 200, 1000])
def test_where_nothing_changed_something_still_may(count: int) -> None:
    losses, right = np.full(count, 0.1), np.ones(count)
    same = outcomes(losses, right)
    drop, interval, upper = accuracy_drop(same, same, 0.95, 2000)
    assert drop == 0
    assert interval.low < 0 < interval.high
    assert 1 / count < upper < 4 / count
    rise, _, most = loss_increase(same, same, 0.95, 200)
    assert rise == most == 0


def test_the_same_outcomes_give_the_same_figures() -> None:
    before, after = drawn(np.random.default_rng(1), 100, 0.05, 0.1)
    np.random.seed(5)  # the caller's generator has no part in it
    first = accuracy_drop(before, after, 0.95, 300), loss_increase(before, after, 0.95, 300)
    assert (
        accuracy_drop(before, after, 0.95, 300),
        loss_increase(before, after, 0.95, 300),
    ) == first


def test_the_class_that_lost_most_is_named_and_small_classes_are_passed_over() -> None:
    count = 100
    labels = np.array([0] * 45 + [1] * 50 + [2] * 5)
    right, after = np.ones(count, bool), np.ones(count, bool)
    after[45:55] = False  # a fifth of class 1
    after[95:] = False  # all of class 2, of which there are five
    number, losses = np.arange(count), np.zeros(count)
    worst = class_drop(
        Outcomes(losses, right, labels, number), Outcomes(losses, after, labels, number)
    )
    assert (worst.number, worst.drop) == (1, pytest.approx(0.2))
    assert 0 < worst.error < 0.1


def test_positions_count_by_share_where_samples_have_several() -> None:
    sample = np.array([0, 0, 0, 1])
    labels, losses = np.zeros(4, int), np.zeros(2)
    before = Outcomes(losses, np.array([True, True, True, True]), labels, sample)
    after = Outcomes(losses, np.array([True, False, True, True]), labels, sample)
    assert before.accuracy == before.shares.mean() == 1
    assert accuracy_drop(before, after, 0.95, 100)[0] == pytest.approx(0.25)
