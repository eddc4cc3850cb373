"""Units inside the noise stay, and every other reason to stay or to fall short is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from networks import bundle, chain, settings, vectors

from elesh import analyze
from elesh.analysis import ImportanceTracker, channel_metrics, explain
from elesh.analysis.candidates import Candidates, Floats
from elesh.analysis.selection.choose import error_bars, select, without_noise
from elesh.analysis.selection.removal_order import JointOrder
from leyline import AnalysisParameters, CheckpointBundle, GateStatistics


def gate(name: str, columns: np.ndarray) -> GateStatistics:
    size = columns.shape[1]
    return GateStatistics(
        layer_name=name,
        projections=columns.astype(np.float32),
        first_order=np.zeros(size, np.float32),
        second_order=np.ones(size, np.float32),
    )


def network(sizes: dict[int, float], noise: float, samples: int = 128) -> CheckpointBundle:
    """One group of 40 channels of size 1 but for some; a share of each is noise of samples."""
    rng = np.random.default_rng(0)
    scale = np.array([sizes.get(i, 1.0) for i in range(40)])
    steady = np.where(np.arange(samples) % 2, 1.0, -1.0)[:, None] * rng.choice([-1, 1], 40)
    columns = scale * (
        np.sqrt(1 - noise) * steady + np.sqrt(noise) * rng.standard_normal((samples, 40))
    )
    made = bundle(chain((40,)), epoch=120, samples=samples)
    return replace(made, gates={"g0": gate("g0", columns)})


def test_error_bars_are_those_of_the_marginal_costs() -> None:
    rng = np.random.default_rng(1)
    columns: Floats = rng.standard_normal((6, 50)).astype(np.float32)
    bars = error_bars(columns, [4, 0, 2], shrinkage=1.0)
    moved, before = np.zeros(50), 0.0
    for place, unit in enumerate([4, 0, 2]):
        moved = moved + columns[unit]
        now = float(np.mean(moved**2))
        assert bars.costs[place] == pytest.approx(now - before)
        before = now
    x = columns[4].astype(float) ** 2
    expected = max(x.std() / np.sqrt(50), abs(x[:25].mean() - x[25:].mean()) / 2)
    assert bars.errors[0] == pytest.approx(expected)


def test_halves_of_the_samples_that_disagree_widen_the_bars() -> None:
    columns: Floats = np.repeat(np.float32([[1.0, 3.0]]), 25, axis=1).reshape(1, 50)
    bars = error_bars(columns, [0])
    assert bars.costs[0] == pytest.approx(5)
    assert bars.errors[0] == pytest.approx(4), "the scatter alone would say .57"


def test_groups_that_can_lose_nothing_have_no_say_in_what_is_typical() -> None:
    rng = np.random.default_rng(3)
    columns: Floats = rng.choice([-1, 1], (8, 64)).astype(np.float32)
    columns[4:] *= 100
    candidates = Candidates(("a", "full"), (4, 4), (3, 0), (1, 1))
    selection = select(lambda: JointOrder(candidates, columns), 3, ())
    assert len(selection.units) == 3
    left = without_noise(selection, columns)
    assert (left.units, len(left.noise)) == ((), 3)


def test_where_units_cannot_be_told_apart_none_goes() -> None:
    decision = analyze(network({}, noise=0.01), settings(redundancy_threshold=1.0))
    assert decision.channels == ()
    assert not decision.approved_for_application
    assert "7 inside the noise" in decision.statistics.shortfall
    (group,) = decision.spared
    assert [unit.reason for unit in group.spared].count("noise") == 7
    rows = explain(decision).units
    assert "inside the noise of the samples" in {row.reason for row in rows}


def test_a_unit_that_is_surely_small_goes_and_one_that_may_be_large_stays() -> None:
    checkpoint = network({3: 0.01, 8: 0.02}, noise=0.5)
    decision = analyze(checkpoint, settings(redundancy_threshold=1.0))
    (target,) = decision.channels
    assert {3, 8} <= set(target.channel_indices)
    assert len(target.errors) == len(target.channel_indices)
    own = np.square(checkpoint.gates["g0"].projections.astype(float))
    for unit in target.channel_indices:
        assert own[:, unit].mean() + 2 * own[:, unit].std() / np.sqrt(len(own)) < own.mean()
    told = [unit.index for unit in target.spared if unit.reason == "noise"]
    assert set(told).isdisjoint(target.channel_indices)
    assert decision.statistics.shortfall.count("noise") == bool(told)


def test_a_group_that_noise_leaves_without_its_multiple_gives_back_more() -> None:
    decision = analyze(
        network({3: 0.01, 8: 0.02}, noise=0.01),
        settings(redundancy_threshold=1.0, round_to=4),
    )
    for target in decision.channels:
        assert target.channels_after % 4 == 0
    assert decision.units == {}


def test_what_is_asked_and_not_allowed_is_told() -> None:
    parameters = AnalysisParameters(target_ratio=0.5, ignored_layers=("g0",))
    decision = analyze(bundle(chain((64, 96)), epoch=120, parameters=parameters), settings())
    assert "asked for 50.00% of the original channels" in decision.statistics.shortfall
    assert "18.00%" in dict(explain(decision).figures)["not met"]
    reason = dict(decision.ignored)["g0"]
    assert reason.startswith("ignored by the request: g0; ")
    assert "would cost no more than the most expensive that goes" in reason


def test_groups_that_cannot_fill_the_quota_say_so() -> None:
    decision = analyze(bundle(chain((18, 200)), epoch=120), settings(min_channels_per_layer=190))
    gone, s = sum(map(len, decision.units.values())), decision.statistics
    assert gone < s.quota
    assert f"{s.quota - gone} of the {s.quota} channels that may go stay" in s.shortfall
    assert "below what it must keep" in s.shortfall


def test_a_history_adds_trend_and_stability_to_every_unit() -> None:
    checkpoint = bundle(chain((64, 64)), epoch=120)
    tracker, rng = ImportanceTracker(), np.random.default_rng(0)
    for epoch in range(10, 120, 10):
        for group in checkpoint.architecture.groups:
            data = vectors(group.name, group.size, rng)
            rising = {**channel_metrics(data), "taylor": np.full(group.size, 1.0 + epoch / 100)}
            tracker.observe(epoch, group, rising)
    decision = analyze(checkpoint, settings())
    rows = explain(decision, checkpoint, tracker).units
    assert all(row.trend is not None and row.trend > 0 for row in rows)
    assert all(row.stability is not None and 0.9 < row.stability < 1 for row in rows)
    assert all(row.trend is None for row in explain(decision, checkpoint).units)
    row = rows[0]
    track = tracker.track(checkpoint.architecture.group[row.group])["taylor"]
    assert row.trend == pytest.approx(track.trend[row.unit] / track.ema[row.unit])
