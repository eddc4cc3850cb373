"""Channels chosen to a budget of one's own are those that the joint order takes."""

from __future__ import annotations

import numpy as np
import pytest
from networks import bundle, chain

from elesh.analysis import select_channels
from elesh.settings import ChannelAnalysis
from leyline import CheckpointBundle, InvalidField, ShapeMismatch

FREE = ChannelAnalysis(min_channels_per_layer=1, redundancy_threshold=1.0)


def figures(count: int) -> CheckpointBundle:
    return bundle(chain((count, count)), epoch=1)


def gone(units: dict[str, tuple[int, ...]]) -> int:
    return sum(map(len, units.values()))


def test_a_budget_is_met_whatever_the_phase_until_the_minimums_stop_it() -> None:
    made = figures(24)
    assert select_channels(made, 0) == {}
    assert gone(select_channels(made, 13)) == 13
    assert gone(select_channels(made, 40)) == 16  # 16 stay in each of two groups of 24.
    assert gone(select_channels(made, 40, settings=FREE)) == 40


def test_multiples_hold() -> None:
    made = figures(24)
    settings = ChannelAnalysis(min_channels_per_layer=4, round_to=8)
    units = select_channels(made, 20, settings=settings)
    assert {len(lost) % 8 for lost in units.values()} == {0}
    assert gone(units) == 16


def test_the_choice_is_the_greedy_one_from_what_was_moved() -> None:
    made = figures(12)
    names = list(made.gates)
    columns = np.concatenate([made.gates[n].projections for n in names], axis=1).astype(float)
    moved = np.random.default_rng(3).standard_normal(len(columns)) * columns.std() * 3
    left, taken = moved.copy(), []
    for _ in range(6):
        costs = (columns**2).mean(0) - 2 * (left[:, None] * columns).mean(0)
        costs[taken] = np.inf
        taken.append(int(costs.argmin()))
        left -= columns[:, taken[-1]]
    found = select_channels(made, 6, settings=FREE, moved=moved)
    places = [12 * names.index(name) + unit for name, units in found.items() for unit in units]
    assert sorted(places) == sorted(taken)
    assert found != select_channels(made, 6, settings=FREE)


def test_scores_that_are_not_joint_choose_too_but_know_no_movement() -> None:
    made = figures(24)
    assert gone(select_channels(made, 10, scorer="multi_metric")) == 10
    with pytest.raises(InvalidField, match="moved"):
        select_channels(made, 10, scorer="multi_metric", moved=np.zeros(128))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidField, match="count"):
        select_channels(figures(24), -1)
    with pytest.raises(ShapeMismatch, match="moved"):
        select_channels(figures(24), 3, moved=np.zeros(5))
